"""The compiled kernel."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


@cache
def extension() -> Any:
    """The kernel; compiles it the first time, with nvcc.

    Raises:
        Exception: As PyTorch's extension loader raises it.
    """
    from torch.utils.cpp_extension import load

    here = Path(__file__).parent
    return load(
        "rfloor_int4",
        [str(here / "binding.cpp"), str(here / "product.cu")],
        extra_cuda_cflags=["-O3", "-std=c++17"],
    )

"""The product with an int4 weight: the CUDA extension for a few rows, plain torch for many or without a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backends.int4 import layout

if TYPE_CHECKING:
    from torch import Tensor

WARPS = (14, 8, 7, 4)
"""Of a block: what the kernel is compiled for."""
FULL = 0.9
"""Least share of the warps' turns in which they have a group."""
WARPS_A_PROCESSOR = 28
"""As many as its registers have room for."""
MOST_ROWS = 8
"""Rows of activations that the kernel takes at a time."""


class Int4Linear(torch.nn.Module):
    """A linear layer on a packed weight; see `backends.int4.layout`.

    Args:
        words: As `layout.pack` gives them.
        scales: As `layout.pack_scales` gives them.
        bias: `[rows]` or `None`.
        dtype: The weight's, dequantised.
    """

    words: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, words: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.dtype = dtype
        self.cut = cut(words.shape[1], str(words.device)) if words.is_cuda else None

    def weight(self) -> Tensor:
        """Dequantised, `[rows, columns]`."""
        return layout.weight(self.words, self.scales).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` to `[..., rows]`."""
        rows = x.numel() // x.shape[-1]
        if self.cut and rows <= MOST_ROWS and x.dtype == torch.bfloat16:
            flat = x.reshape(rows, x.shape[-1]).contiguous()
            out: Tensor = extension().product(flat, self.words, self.scales, self.bias, *self.cut)
            return out.view(*x.shape[:-1], -1)
        return torch.nn.functional.linear(x, self.weight(), self.bias)


@cache
def cut(groups: int, device: str) -> tuple[int, int]:
    """Warps of a block and blocks of a launch, for a weight of so many groups a row."""
    turns = {warps: -(-groups // warps) * warps for warps in WARPS}
    warps = next((w for w in WARPS if groups / turns[w] >= FULL), WARPS[-1])
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return warps, processors * (WARPS_A_PROCESSOR // warps)


@cache
def extension() -> Any:
    """The compiled kernel; compiles it the first time, with nvcc.

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

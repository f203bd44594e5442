"""What an exception means and what it says, in one line."""

from __future__ import annotations

import re
import sys

COMPILER_ERROR = re.compile(r"\b(fatal )?error( [A-Z]+\d+)?: ")  # gcc, nvcc, clang, cl


def telling_line(error: BaseException, otherwise: int = -1) -> str:
    """The last thing that a compiler said; ninja and loaders say more after it.

    Args:
        error: What a compilation raised.
        otherwise: Which of the message's lines it is where no compiler spoke.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    compilers = [line for line in lines if COMPILER_ERROR.search(line)]
    return compilers[-1] if compilers else lines[otherwise]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "CUDA error: out of memory" in str(error)
    )

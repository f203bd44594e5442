"""The product with an int4 weight: the CUDA extension for a few rows, plain torch for many or without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from backends.int4 import layout
from backends.int4.kernel.launches import SHARED_BYTES, table
from backends.int4.kernel.loader import extension

if TYPE_CHECKING:
    from torch import Tensor

    from backends.int4.kernel.launches import Arguments


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
        self._launches: dict[int, Arguments] = {}

    def exact(self) -> Tensor:
        """Dequantised, float32 `[rows, columns]`."""
        return layout.weight(self.words, self.scales)

    def weight(self) -> Tensor:
        """Dequantised and rounded, `[rows, columns]`."""
        return self.exact().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` to `[..., rows]`."""
        columns = x.shape[-1]
        rows = x.numel() // columns
        if self.words.is_cuda and rows <= layout.MOST_ROWS and x.dtype == torch.bfloat16:
            flat = x.reshape(rows, columns).contiguous()
            parts = torch.split(flat, min(layout.AT_ONCE, max(1, SHARED_BYTES // (2 * columns))))
            found = [
                extension().product(part, self.words, self.scales, self.bias, *self._launch(len(part)))
                for part in parts
            ]
            out = found[0] if len(found) == 1 else torch.cat(found)
            return out.view(*x.shape[:-1], -1)
        return torch.nn.functional.linear(x, self.weight(), self.bias)

    def _launch(self, streams: int) -> Arguments:
        if streams not in self._launches:  # a table is asked once a number of streams, not once a product
            tiles, groups, *_ = self.words.shape
            self._launches[streams] = table().launch(str(self.words.device), tiles, groups, streams)
        return self._launches[streams]

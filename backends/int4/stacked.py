"""Layers that share one packed weight, its rows in the order that a fused product wants: what meets is in a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from backends.int4 import layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from backends.int4.product import Int4Linear


@dataclass(frozen=True)
class Stored:
    """What a product reads of a weight.

    Attributes:
        words: As `layout.pack` gives them.
        scales: As `layout.pack_scales` gives them.
        bias: `[rows]` in the order of the packed rows, or `None`.
    """

    words: Tensor
    scales: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Packed(Stored):
    """A weight whose rows lie in an order of their own.

    Attributes:
        places: int64 `[rows]`, where each row stands.
    """

    places: Tensor


def packed(layers: Sequence[Int4Linear], places: Tensor) -> Packed:
    """Layers one below the other, each row where `places` has it, int64 `[rows]` where they lie."""
    order = places.argsort()
    codes = torch.cat([layout.unpack(layer.words) for layer in layers])[order]
    scales = torch.cat([layout.unpack_scales(layer.scales) for layer in layers])[order]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases)[order] if biases else None
    return Packed(layout.pack(codes), layout.pack_scales(scales), bias, places)


def alone(layer: Int4Linear) -> Stored:
    """A layer as it is."""
    return Stored(layer.words, layer.scales, layer.bias)


class Part(torch.nn.Module):
    """One of the layers, as a prompt is read with it: its weight is dequantised for the product.

    Args:
        whole: Has its rows.
        start: Where they begin.
        layer: As it was.
    """

    words: Tensor
    scales: Tensor

    def __init__(self, whole: Packed, start: int, layer: Int4Linear) -> None:
        super().__init__()
        self._whole, self._dtype = whole, layer.dtype
        self._places = whole.places[start : start + layer.words.shape[0] * layout.ROWS]
        self.register_buffer("words", whole.words)
        self.register_buffer("scales", whole.scales)

    @property
    def bias(self) -> Tensor | None:
        """`[rows]`."""
        bias = self._whole.bias
        return None if bias is None else bias[self._places]

    def exact(self) -> Tensor:
        """Dequantised, float32 `[rows, columns]`."""
        return layout.weight(self.words, self.scales, self._places)

    def weight(self) -> Tensor:
        """Dequantised and rounded, `[rows, columns]`."""
        return self.exact().to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` to `[..., rows]`."""
        return torch.nn.functional.linear(x, self.weight(), self.bias)


def turned(heads: int, head_dim: int) -> Tensor:
    """The order of the rows of q, k and v, all heads of them: members of rotary pairs meet."""
    half = torch.arange(heads)[:, None] * head_dim + torch.arange(head_dim // 2)
    return layout.paired(half, half + head_dim // 2)


def gated(ffn: int) -> Tensor:
    """The order of the rows of gate and up: what is multiplied with each other meets."""
    return layout.paired(torch.arange(ffn), torch.arange(ffn) + ffn)

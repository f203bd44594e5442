"""How int4 weights lie in memory: as the registers of a tensor core's tile want them.

A group is 128 input features of one output feature, with one float16 scale: w = (code - 8) * scale, codes 0..15.
Sixteen output features by one group is a tile; each of a warp's 32 lanes has 64 codes of it, in two loads of 16
bytes. Two words hold what one `mma.m16n8k32` (PTX ISA, "Matrix Fragments for mma.m16n8k32") takes of a lane: rows r
and r + 8 of the tile, r = lane / 4, and eight neighbouring input features. Which features those are is free as long
as the activations follow: lane % 4 has 32 neighbours of the group.

    word w (0..7), byte b (0..3): input feature 32 * (lane % 4) + 4 * w + b
        upper nibble: row r; lower nibble: row r + 8; both code - 8 in two's complement

so that `word & 0xf0f0f0f0` and `word << 4 & 0xf0f0f0f0` are four signed bytes each, sixteen times the weights'
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128
ROWS = 16
"""Output features of a tile."""
AT_ONCE = 4
"""Rows of activations that the kernel takes at a time."""
MOST_ROWS = 8
"""Rows of activations for which a weight is multiplied as it lies in memory; for more it is dequantised."""
WORDS = 8
"""Of a lane and group."""
MIDDLE = 8
"""The code of a weight of zero."""


def pack(codes: Tensor) -> Tensor:
    """Codes into words.

    Args:
        codes: uint8 `[rows, columns]`, rows in multiples of 16, columns of 128.

    Returns:
        int32 `[rows / 16, columns / 128, 2, 32, 4]`: tiles, groups, loads, lanes, words.
    """
    import torch

    rows, columns = codes.shape
    tiles, groups = rows // ROWS, columns // GROUP
    # tiles, half, row, groups, block, word, byte; the lower nibble is the second half's
    split = (codes ^ MIDDLE).reshape(tiles, 2, 8, groups, 4, WORDS, 4).flip(1)
    split = split.permute(0, 3, 5, 2, 4, 6, 1).reshape(tiles, groups, WORDS, 32, 8)
    words = torch.zeros(split.shape[:-1], dtype=torch.int32, device=codes.device)
    for nibble in range(8):
        words |= split[..., nibble].int() << 4 * nibble
    return words.reshape(tiles, groups, 2, 4, 32).transpose(3, 4).contiguous()


def unpack(words: Tensor, rows: Tensor | None = None) -> Tensor:
    """The inverse of `pack`.

    Args:
        words: As `pack` gives them.
        rows: int64 `[n]`, which rows in which order; all of them if `None`.
    """
    import torch

    tiles, groups = words.shape[:2]
    if rows is None:
        rows = torch.arange(tiles * ROWS, device=words.device)
    tile, half, row = rows // ROWS, rows % ROWS // 8, rows % 8
    # rows, groups, load, block, word: those that a row shares with the one eight behind or before it
    held = words.reshape(tiles, groups, 2, 8, 4, 4).transpose(1, 3).transpose(2, 3)[tile, row]
    shifted = held >> (4 * (1 - half))[:, None, None, None, None].int()
    nibbles = torch.stack([(shifted >> 8 * byte) & 15 for byte in range(4)], -1).to(torch.uint8)
    return nibbles.transpose(2, 3).reshape(len(rows), groups * GROUP) ^ MIDDLE


def pack_scales(scales: Tensor) -> Tensor:
    """float16 `[rows, groups]` -> `[rows / 16, groups, 8, 2]`: those of rows r and r + 8 beside each other."""
    rows, groups = scales.shape
    return scales.reshape(rows // ROWS, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def unpack_scales(scales: Tensor) -> Tensor:
    """The inverse of `pack_scales`."""
    tiles, groups = scales.shape[:2]
    return scales.permute(0, 3, 2, 1).reshape(tiles * ROWS, groups)


def weight(words: Tensor, scales: Tensor, rows: Tensor | None = None) -> Tensor:
    """What packed words and scales stand for, float32 `[rows, columns]`; `rows` as in `unpack`."""
    codes, scale = unpack(words, rows).float() - MIDDLE, unpack_scales(scales)
    if rows is not None:
        scale = scale[rows]
    return (codes.reshape(*scale.shape, GROUP) * scale.float()[..., None]).flatten(1)


def paired(first: Tensor, second: Tensor) -> Tensor:
    """The order of rows in which two of each eight meet in a tile: row r of it from `first`, r + 8 from `second`.

    Args:
        first: Indices of rows, int64, in multiples of 8.
        second: As many.
    """
    import torch

    return torch.stack([first.reshape(-1, 8), second.reshape(-1, 8)], 1).flatten()

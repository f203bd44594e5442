"""How int4 weights lie in memory: as the registers of a tensor core's tile want them.

A group is 128 input features of one output feature, with one float16 scale: w = (code - 8) * scale, codes 0..15.
Sixteen output features by one group is a tile; each of a warp's 32 lanes has 64 codes of it, in two loads of 16
bytes. A word holds what one `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16") takes of a lane: rows r and
r + 8 of the tile, r = lane / 4, and four neighbouring input features. Which features those are is free as long as the
activations follow: lane % 4 has 32 neighbours of the group, so it loads them 16 bytes at a time.

    word of step s (0..7), nibble n and n + 4, n = 0..3:  rows r, r + 8, r, r + 8
        input features 32 * (lane % 4) + 4 * s + (0, 0, 2, 2)[n], and the one behind it in nibble n + 4

so that `word >> 4 n & 0x000f000f` is a pair of codes a register apart, and one more operation makes two bf16 of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128
ROWS = 16
"""Output features of a tile."""
MOST_ROWS = 8
"""Rows of activations for which a weight is multiplied as it lies in memory; for more it is dequantised."""
STEPS = 8
"""Tensor core products of a tile."""
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
    # tiles, half, row, groups, block, step, pair, feature
    split = codes.reshape(tiles, 2, 8, groups, 4, STEPS, 2, 2)
    # tiles, groups, step, row, block, then the nibbles: feature, pair, half
    split = split.permute(0, 3, 5, 2, 4, 7, 6, 1).reshape(tiles, groups, STEPS, 32, 8)
    words = torch.zeros(split.shape[:-1], dtype=torch.int32, device=codes.device)
    for nibble in range(8):
        words |= split[..., nibble].int() << 4 * nibble
    return words.reshape(tiles, groups, 2, 4, 32).transpose(3, 4).contiguous()


def unpack(words: Tensor) -> Tensor:
    """The inverse of `pack`."""
    import torch

    tiles, groups = words.shape[:2]
    steps = words.transpose(3, 4).reshape(tiles, groups, STEPS, 32)
    nibbles = torch.stack([(steps >> 4 * nibble) & 15 for nibble in range(8)], -1).to(torch.uint8)
    split = nibbles.reshape(tiles, groups, STEPS, 8, 4, 2, 2, 2)
    return split.permute(0, 7, 3, 1, 4, 2, 6, 5).reshape(tiles * ROWS, groups * GROUP)


def pack_scales(scales: Tensor) -> Tensor:
    """float16 `[rows, groups]` -> `[rows / 16, groups, 8, 2]`: those of rows r and r + 8 beside each other."""
    rows, groups = scales.shape
    return scales.reshape(rows // ROWS, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def unpack_scales(scales: Tensor) -> Tensor:
    """The inverse of `pack_scales`."""
    tiles, groups = scales.shape[:2]
    return scales.permute(0, 3, 2, 1).reshape(tiles * ROWS, groups)


def weight(words: Tensor, scales: Tensor) -> Tensor:
    """The weight that packed words and scales stand for, float32 `[rows, columns]`."""
    codes, scale = unpack(words).float() - MIDDLE, unpack_scales(scales).float()
    return (codes.reshape(*scale.shape, GROUP) * scale[..., None]).flatten(1)


def paired(first: Tensor, second: Tensor) -> Tensor:
    """The order of rows in which two of each eight meet in a tile: row r of it from `first`, r + 8 from `second`.

    Args:
        first: Indices of rows, int64, in multiples of 8.
        second: As many.
    """
    import torch

    return torch.stack([first.reshape(-1, 8), second.reshape(-1, 8)], 1).flatten()

"""Group-wise int4: rounding to nearest, and the two ways in which GPTQ and AWQ lay eight codes into a word.

Plain torch and our own, so that a runtime's kernel is held against something that shares no code with it.
Weights are `[out_features, in_features]` as torch has them; codes are uint8 0..15; a group is a run of input
features of one output feature, with one scale (and one zero) of its own: w = (code - zero) * scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
LEVELS = 1 << BITS
WORD = 32 // BITS
"""Codes in an int32."""
MIDDLE = LEVELS // 2
"""The zero of symmetric quantisation."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns stands in nibble 0, 1, ... of an AWQ word (llm-awq's GEMM layout)."""
PLAIN_ORDER = tuple(range(WORD))


class Codes(NamedTuple):
    """A quantised weight.

    Attributes:
        codes: uint8 `[out, in]`.
        scales: float16 `[out, groups]`.
        zeros: uint8 `[out, groups]`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def symmetric(weight: Tensor, group_size: int) -> Codes:
    """Round to the nearest of -7..7 times a scale; the zero is 8, as GPTQ's symmetric kernels take for granted."""
    import torch

    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    scales = (groups.abs().amax(-1) / (MIDDLE - 1)).half().clamp_min(torch.finfo(torch.half).tiny)
    codes = (groups / scales.float()[..., None]).round_().add_(MIDDLE).clamp_(0, LEVELS - 1)
    return Codes(codes.to(torch.uint8).flatten(1), scales, torch.full_like(scales, MIDDLE, dtype=torch.uint8))


def asymmetric(weight: Tensor, group_size: int) -> Codes:
    """Round to the nearest of sixteen levels between a group's least and largest weight, zero among them."""
    import torch

    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / (LEVELS - 1)).half().clamp_min(torch.finfo(torch.half).tiny)
    zeros = (-low / scales.float()).round_().clamp_(0, LEVELS - 1)
    codes = (groups / scales.float()[..., None]).round_().add_(zeros[..., None]).clamp_(0, LEVELS - 1)
    return Codes(codes.to(torch.uint8).flatten(1), scales, zeros.to(torch.uint8))


def dequantize(quantised: Codes) -> Tensor:
    """The weight, float32 `[out, in]`."""
    codes, scales, zeros = quantised
    groups = codes.float().reshape(*scales.shape, -1)
    return ((groups - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)


def pack_rows(codes: Tensor) -> Tensor:
    """Eight neighbouring rows into one int32: uint8 `[rows, columns]` -> int32 `[rows / 8, columns]`."""
    import torch

    words = torch.zeros(codes.shape[0] // WORD, codes.shape[1], dtype=torch.int32, device=codes.device)
    for nibble in range(WORD):
        words |= codes[nibble::WORD].int() << (BITS * nibble)
    return words


def unpack_rows(words: Tensor) -> Tensor:
    """The inverse of `pack_rows`."""
    import torch

    nibbles = [(words >> (BITS * nibble)) & (LEVELS - 1) for nibble in range(WORD)]
    return torch.stack(nibbles, 1).flatten(0, 1).to(torch.uint8)


def pack_columns(codes: Tensor, order: tuple[int, ...] = PLAIN_ORDER) -> Tensor:
    """Eight neighbouring columns into one int32: uint8 `[rows, columns]` -> int32 `[rows, columns / 8]`.

    Args:
        codes: The codes.
        order: Which of the eight stands in nibble 0, 1, ...
    """
    import torch

    words = torch.zeros(codes.shape[0], codes.shape[1] // WORD, dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(order):
        words |= codes[:, column::WORD].int() << (BITS * nibble)
    return words


def unpack_columns(words: Tensor, order: tuple[int, ...] = PLAIN_ORDER) -> Tensor:
    """The inverse of `pack_columns`."""
    import torch

    columns = torch.empty(words.shape[0], words.shape[1] * WORD, dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(order):
        columns[:, column::WORD] = ((words >> (BITS * nibble)) & (LEVELS - 1)).to(torch.uint8)
    return columns

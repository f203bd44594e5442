"""The next token: the first of a stream's largest logits.

A logit and its place are one whole number, so that the largest of those is the choice, whoever compares them when.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backends.fused.products import begin, wait

FARTHEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)
"""More than any place; and the order of what is no number, which `torch.argmax` takes for the largest."""


@triton.jit
def ranked(logits, place):
    """int64: of a larger logit larger, of equal ones that of the first. Zeros of either sign are equal."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    # A float's bits are in the floats' order where it is positive, in the opposite one where it is not.
    order = tl.where(logits != logits, FARTHEST, tl.where(bits < 0, bits ^ FARTHEST, bits))
    return (order.to(tl.int64) << 32) | (place ^ FARTHEST).to(tl.int64)


@triton.jit
def fused_best(
    logits,  # float32 [streams, N]
    best,  # int64 [streams, PARTS]
    N,
    PARTS,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best of each part. Grid: PARTS, streams."""
    begin(PDL)
    part, stream = tl.program_id(0), tl.program_id(1)
    place = part * C + tl.arange(0, C)
    wait(PDL)
    found = tl.load(logits + stream.to(tl.int64) * N + place, mask=place < N, other=float("-inf"))
    tl.store(best + stream * PARTS + part, tl.max(ranked(found, place), 0))


@triton.jit
def fused_choose(
    best,  # int64 [streams, PARTS]
    token,  # int64 [streams]
    PARTS,
    P: tl.constexpr,  # PARTS rounded up to a power of two
    PDL: tl.constexpr,
):
    """The best of all parts. Grid: streams."""
    begin(PDL)
    stream, part = tl.program_id(0), tl.arange(0, P)
    own = best + stream * PARTS + tl.minimum(part, PARTS - 1)
    wait(PDL)
    tl.store(token + stream, (tl.max(tl.load(own), 0) & FARTHEST) ^ FARTHEST)

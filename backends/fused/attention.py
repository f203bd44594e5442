"""Attention of one token a stream: the cache in parts, one program each, then what the parts found put together.

The query heads that share a key head are the rows of one tile, padded to the sixteen that a tensor core takes, so
keys and values are read once a group. The parts are of equal length whatever the cache holds; of a short one the last
may be empty. All rows but this token's are there before the step begins: a program's first tile of them is under way
before it waits for the kernel ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backends.fused.products import begin, wait

HEADS: tl.constexpr = tl.constexpr(16)
"""Rows of a tile: the query heads of one key head, and padding."""
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(one, two, INTERPRETED: tl.constexpr):
    """A tile product in float32; the interpreter cannot multiply bf16."""
    if INTERPRETED:
        return tl.dot(one.to(tl.float32), two.to(tl.float32))
    return tl.dot(one, two)


@triton.jit
def cached(rows, start, step, end, D: tl.constexpr):
    """`[N, D]` of keys or values, from a row on; from `end` on they are 0."""
    row, column = start + step, tl.arange(0, D)
    return tl.load(rows + row[:, None] * D + column[None, :], mask=(row < end)[:, None], other=0.0)


@triton.jit
def joined(rows, start, step, old, before, D: tl.constexpr):
    """`before`, this token's row with it. Loaded as it lies there, so that no thread waits for another's."""
    row, column = start + step, tl.arange(0, D)
    return tl.load(rows + row[:, None] * D + column[None, :], mask=(row == old)[:, None], other=before)


@triton.jit
def fused_attend(
    q,  # [streams, Q * D]
    keys,  # [streams, KV, capacity, D]
    values,
    length,  # int32 scalar: rows of the cache, without this token's
    sums,  # float32 [streams, Q, PARTS, D]: unnormalised
    peaks,  # float32 [streams, Q, PARTS, 2]: the largest product times log2(e), and the sum of the exponentials
    capacity,
    scale,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One part of the cache, N rows at a time. Grid: PARTS, key heads, streams."""
    begin(PDL)
    group: tl.constexpr = Q // KV
    part, kv, stream = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, column, step = tl.arange(0, HEADS), tl.arange(0, D), tl.arange(0, N)
    valid = head < group
    own = stream * Q + kv * group + head
    place = (stream * KV + kv).to(tl.int64) * capacity * D
    old = tl.load(length)
    share = tl.cdiv(old + 1, PARTS)
    start, end = part * share, tl.minimum(part * share + share, old + 1)
    k = cached(keys + place, start, step, tl.minimum(end, old), D)
    v = cached(values + place, start, step, tl.minimum(end, old), D)
    wait(PDL)
    k = joined(keys + place, start, step, old, k, D)
    v = joined(values + place, start, step, old, v, D)
    query = tl.load(q + own[:, None] * D + column[None, :], mask=valid[:, None], other=0.0)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, D], tl.float32)
    for at in range(start, end, N):
        row = at + step
        products = dot(query, tl.trans(k), INTERPRETED) * (scale * LOG2E)
        products = tl.where((row < end)[None, :], products, float("-inf"))
        higher = tl.maximum(peak, tl.max(products, 1))
        weights = tl.exp2(products - higher[:, None])
        shrunk = tl.exp2(peak - higher)
        total = total * shrunk + tl.sum(weights, 1)
        found = found * shrunk[:, None] + dot(weights.to(v.dtype), v, INTERPRETED)
        peak = higher
        k = cached(keys + place, at + N, step, end, D)
        v = cached(values + place, at + N, step, end, D)
    at = own * PARTS + part
    tl.store(sums + at[:, None] * D + column[None, :], found, mask=valid[:, None])
    tl.store(peaks + at * 2, peak, mask=valid)
    tl.store(peaks + at * 2 + 1, total, mask=valid)


@triton.jit
def fused_combine(
    sums,  # float32 [streams, Q, PARTS, D]
    peaks,  # float32 [streams, Q, PARTS, 2]
    out,  # [streams, Q * D]
    length,  # int32 scalar, counted up where LAST: no kernel of the step reads it later
    D: tl.constexpr,
    PARTS: tl.constexpr,
    P: tl.constexpr,  # PARTS rounded up to a power of two
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The parts' results weighed by their exponentials. Grid: streams times query heads."""
    begin(PDL)
    part, column = tl.arange(0, P), tl.arange(0, D)
    at = tl.program_id(0) * PARTS + part
    here = part < PARTS
    wait(PDL)
    if LAST:
        tl.store(length, tl.load(length) + 1, mask=tl.program_id(0) == 0)
    peak = tl.load(peaks + at * 2, mask=here, other=float("-inf"))
    total = tl.load(peaks + at * 2 + 1, mask=here, other=0.0)
    found = tl.load(sums + at[:, None] * D + column[None, :], mask=here[:, None], other=0.0)
    weight = tl.exp2(peak - tl.max(peak, 0))  # an empty part has a peak of -inf, and so no weight
    merged = tl.sum(found * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + tl.program_id(0) * D + column, merged.to(out.dtype.element_ty))

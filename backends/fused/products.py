"""The step's products, each with what stands before and behind it fused around one read of the weights.

A program multiplies a few rows of a weight with the activations of every stream. It loads its first tiles before it
waits for the kernel ahead (programmatic dependent launch), and each further one that many ahead of its use: what
bounds a step is how many bytes are under way.

The residual stream is float32. Whoever adds to it leaves what the next norm's product reads: the row times that
norm's gain, rounded (`scaled`), and the sum of its squares. So a product behind a norm reads two bytes an element and
multiplies its sums by the norm's scale. The squares are summed as whole numbers (`UNIT`): the order in which programs
come does not show.

Shapes: activations `[B, K]` of B streams, weights `[rows, K]`, K contiguous. A program has R rows, or R pairs of
rows, of C columns at a time, and DEPTH of these tiles under way. Activations are loaded as `[C]`, a stream at a time,
and what a thread has of them meets what it has of the weight: nothing changes hands through shared memory before the
sums do, as long as a thread has eight columns of a row. What else a product needs is loaded before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

UNIT: tl.constexpr = tl.constexpr(2.0**24)
"""Sums of squares are int64 counts of 1 / UNIT: 6e-8 apart, up to 5e11."""


@triton.jit
def begin(PDL: tl.constexpr):
    """The kernel behind may come up: it waits before it touches what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """What the kernels ahead wrote is there."""
    if PDL:
        gdc_wait()


@triton.jit
def tile(weight, rows, start, K: tl.constexpr, C: tl.constexpr):
    """`[rows, C]` of a weight, from a column on; past the end it is 0."""
    columns = start + tl.arange(0, C)
    at = rows[:, None].to(tl.int64) * K + columns[None, :]
    return tl.load(weight + at, mask=columns[None, :] < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def first_tiles(weight, rows, K: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr):
    """DEPTH tiles of a weight, asked for before the wait for the kernels ahead."""
    begin(PDL)
    tiles = ()
    for one in tl.static_range(DEPTH):
        tiles = tiles + (tile(weight, rows, one * C, K, C),)
    wait(PDL)
    return tiles


@triton.jit
def activations(x, start, B: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """`[C]` of each stream, from a column on; past the end they are 0."""
    columns, found = start + tl.arange(0, C), ()
    for stream in tl.static_range(B):
        found = found + (tl.load(x + stream * K + columns, mask=columns < K, other=0.0),)
    return found


@triton.jit
def product(first, x, weight, rows, B: tl.constexpr, K: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr):
    """`x @ weight[rows].T` in float32, `[rows]` for each stream; the tiles `first` are already here.

    Activations are as far ahead as weights: whoever waits for them has nothing under way.
    """
    sums, values = (), ()
    for _ in tl.static_range(B):
        sums = sums + (tl.zeros(first[0].shape, tl.float32),)
    for one in tl.static_range(DEPTH):
        values = values + activations(x, one * C, B, K, C)
    weights = first
    for start in range(0, K, DEPTH * C):
        kept, following = (), ()
        for one in tl.static_range(DEPTH):
            wide, grown = weights[one].to(tl.float32), ()
            for stream in tl.static_range(B):
                grown = grown + (sums[stream] + values[one * B + stream].to(tl.float32)[None, :] * wide,)
            sums = grown
            kept = kept + (tile(weight, rows, start + (DEPTH + one) * C, K, C),)
            following = following + activations(x, start + (DEPTH + one) * C, B, K, C)
        weights, values = kept, following
    found = ()
    for stream in tl.static_range(B):
        found = found + (tl.sum(sums[stream], 1),)
    return found


@triton.jit
def whole(number):
    """A float32 sum of squares as a count of units, to the nearest."""
    return (number * UNIT + 0.5).to(tl.int64)


@triton.jit
def norm_scales(squares, eps, B: tl.constexpr, K: tl.constexpr):
    """What each stream's product behind a norm is to be multiplied by."""
    scales = ()
    for stream in tl.static_range(B):
        scales = scales + (tl.rsqrt(tl.load(squares + stream).to(tl.float32) * (1 / (UNIT * K)) + eps),)
    return scales


@triton.jit
def halves(both, R: tl.constexpr):
    """`[2 R]`, first members then second ones, as two of `[R]`."""
    return tl.split(tl.trans(tl.reshape(both, [2, R])))


@triton.jit
def fused_qkv(
    scaled,  # [B, K]
    squares,  # int64 [B]
    weight,  # [(Q + 2 KV) * D, K]: q, k and v stacked
    bias,  # [(Q + 2 KV) * D], or anything where BIASED is not set
    cos,  # float32 [capacity, D / 2]
    sin,
    length,  # int32 scalar: rows of the cache, without this token's
    q,  # [B, Q * D]
    keys,  # [B, KV, capacity, D]
    values,
    capacity,
    eps,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The three projections, their biases, rotary positions; k and v go to this token's row of the cache.

    A program has R pairs of rows of one head: rotary positions turn the members of a pair, half a head apart.
    """
    half: tl.constexpr = D // 2
    pair = tl.program_id(0) * R
    head = pair // half
    place = pair % half + tl.arange(0, R)  # in the first half of the head
    member = tl.arange(0, 2 * R)
    rows = head * D + pair % half + member % R + (member // R) * half
    row = tl.load(length)
    turned = head < Q + KV
    c = tl.load(cos + row * half + place, mask=turned, other=1.0)
    s = tl.load(sin + row * half + place, mask=turned, other=0.0)
    biases = tl.load(bias + rows).to(tl.float32) if BIASED else 0.0
    first = first_tiles(weight, rows, K, C, DEPTH, PDL)
    scales = norm_scales(squares, eps, B, K)
    found = product(first, scaled, weight, rows, B, K, C, DEPTH)
    for stream in tl.static_range(B):
        both = found[stream] * scales[stream] + biases
        one, two = halves(both, R)
        if head < Q:
            out = q + (stream * Q + head) * D + place
        elif head < Q + KV:
            out = keys + ((stream * KV + head - Q).to(tl.int64) * capacity + row) * D + place
        else:
            out = values + ((stream * KV + head - Q - KV).to(tl.int64) * capacity + row) * D + place
        tl.store(out, (one * c - two * s).to(q.dtype.element_ty))
        tl.store(out + half, (two * c + one * s).to(q.dtype.element_ty))


@triton.jit
def fused_swiglu(
    scaled,  # [B, K]
    squares,  # int64 [B]
    weight,  # [2 F, K]: gate and up stacked
    out,  # [B, F]
    eps,
    F: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gate and up projection, `silu(gate) * up`. A program has R rows of each."""
    member = tl.arange(0, 2 * R)
    rows = tl.program_id(0) * R + member % R + (member // R) * F
    first = first_tiles(weight, rows, K, C, DEPTH, PDL)
    scales = norm_scales(squares, eps, B, K)
    found = product(first, scaled, weight, rows, B, K, C, DEPTH)
    at = tl.program_id(0) * R + tl.arange(0, R)
    for stream in tl.static_range(B):
        gate, up = halves(found[stream] * scales[stream], R)
        tl.store(out + stream * F + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty))


@triton.jit
def fused_residual(
    x,  # float32 [B, N]: added to
    inner,  # [B, K]
    weight,  # [N, K]
    gain,  # [N]: of the next norm
    scaled,  # [B, N]
    squares,  # int64 [B]: added to
    N: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A projection back into the residual stream, for the next norm. A program alone owns its R elements of it."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    gains = tl.load(gain + rows).to(tl.float32)
    first = first_tiles(weight, rows, K, C, DEPTH, PDL)
    before = ()
    for stream in tl.static_range(B):
        before = before + (tl.load(x + stream * N + rows),)
    found = product(first, inner, weight, rows, B, K, C, DEPTH)
    for stream in tl.static_range(B):
        at, sums = stream * N + rows, before[stream] + found[stream]
        tl.store(x + at, sums)
        tl.store(scaled + at, (sums * gains).to(scaled.dtype.element_ty))
        tl.atomic_add(squares + stream, whole(tl.sum(sums * sums, 0)), sem="relaxed")


@triton.jit
def fused_head(
    scaled,  # [B, K]
    squares,  # int64 [B], or anything where NORMED is set
    weight,  # [N, K]
    logits,  # float32 [B, N]
    eps,
    NORMED: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """LM head on what the last norm's product reads, or on what is NORMED already."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    first = first_tiles(weight, rows, K, C, DEPTH, PDL)
    scales = (1.0,) * B if NORMED else norm_scales(squares, eps, B, K)
    found = product(first, scaled, weight, rows, B, K, C, DEPTH)
    for stream in tl.static_range(B):
        tl.store(logits + stream * N + rows, found[stream] * scales[stream])

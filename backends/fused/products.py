"""The step's products, each with what stands before and behind it fused around one read of the weights.

A program multiplies a few rows of a weight with the activations of every stream. It loads its first tile before it
waits for the kernel ahead (programmatic dependent launch), and each further tile one ahead of its use: what bounds a
step is how many bytes are under way. Sums are float32; a norm's scale is applied behind the product, so that the
activations are read once.

Shapes: activations `[B, K]` of B streams, weights `[rows, K]`, K contiguous. A program has R rows, or R pairs of
rows, of C columns at a time. Activations are loaded as `[C]`, a stream at a time, and what a thread has of them meets
what it has of the weight: nothing changes hands through shared memory before the sums do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
def product(first, x, weight, rows, B: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """`x @ weight[rows].T` in float32, `[rows]` for each stream; the tile `first` is already here."""
    sums = ()
    for _ in tl.static_range(B):
        sums = sums + (tl.zeros(first.shape, tl.float32),)
    weights = first
    for start in range(0, K, C):
        following = tile(weight, rows, start + C, K, C)
        columns = start + tl.arange(0, C)
        wide = weights.to(tl.float32)
        grown = ()
        for stream in tl.static_range(B):
            values = tl.load(x + stream * K + columns, mask=columns < K, other=0.0).to(tl.float32)
            grown = grown + (sums[stream] + values[None, :] * wide,)
        sums = grown
        weights = following
    found = ()
    for stream in tl.static_range(B):
        found = found + (tl.sum(sums[stream], 1),)
    return found


@triton.jit
def normed_product(first, x, gain, weight, rows, eps, B: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """`rmsnorm(x) @ weight[rows].T` in float32, `[rows]` for each stream; the tile `first` is already here."""
    sums, squares = (), ()
    for _ in tl.static_range(B):
        sums = sums + (tl.zeros(first.shape, tl.float32),)
        squares = squares + (tl.zeros([C], tl.float32),)
    weights = first
    for start in range(0, K, C):
        following = tile(weight, rows, start + C, K, C)
        columns = start + tl.arange(0, C)
        gains = tl.load(gain + columns, mask=columns < K, other=0.0).to(tl.float32)
        wide = weights.to(tl.float32)
        grown, seen = (), ()
        for stream in tl.static_range(B):
            values = tl.load(x + stream * K + columns, mask=columns < K, other=0.0)
            seen = seen + (squares[stream] + values * values,)
            grown = grown + (sums[stream] + (values * gains)[None, :] * wide,)
        sums, squares = grown, seen
        weights = following
    found = ()
    for stream in tl.static_range(B):
        scale = tl.rsqrt(tl.sum(squares[stream], 0) / K + eps)
        found = found + (tl.sum(sums[stream], 1) * scale,)
    return found


@triton.jit
def halves(both, R: tl.constexpr):
    """`[2 R]`, first members then second ones, as two of `[R]`."""
    return tl.split(tl.trans(tl.reshape(both, [2, R])))


@triton.jit
def fused_qkv(
    x,  # float32 [B, K]
    gain,  # [K]
    weight,  # [(Q + 2 KV) * D, K]: q, k and v stacked
    bias,  # [(Q + 2 KV) * D], or anything where BIASED is not set
    cos,  # float32 [capacity, D / 2]
    sin,
    length,  # int32 scalar: rows of the cache, this token's included
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
    PDL: tl.constexpr,
):
    """Norm, the three projections, their biases, rotary positions; k and v go to this token's row of the cache.

    A program has R pairs of rows of one head: rotary positions turn the members of a pair, half a head apart.
    """
    begin(PDL)
    half: tl.constexpr = D // 2
    pair = tl.program_id(0) * R
    head = pair // half
    place = pair % half + tl.arange(0, R)  # in the first half of the head
    member = tl.arange(0, 2 * R)
    rows = head * D + pair % half + member % R + (member // R) * half
    first = tile(weight, rows, 0, K, C)
    wait(PDL)
    found = normed_product(first, x, gain, weight, rows, eps, B, K, C)
    row = tl.load(length) - 1
    turned = head < Q + KV
    c = tl.load(cos + row * half + place, mask=turned, other=1.0)
    s = tl.load(sin + row * half + place, mask=turned, other=0.0)
    for stream in tl.static_range(B):
        both = found[stream]
        if BIASED:
            both += tl.load(bias + rows).to(tl.float32)
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
    x,  # float32 [B, K]
    gain,  # [K]
    weight,  # [2 F, K]: gate and up stacked
    out,  # [B, F]
    eps,
    F: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, gate and up projection, `silu(gate) * up`. A program has R rows of each."""
    begin(PDL)
    member = tl.arange(0, 2 * R)
    rows = tl.program_id(0) * R + member % R + (member // R) * F
    first = tile(weight, rows, 0, K, C)
    wait(PDL)
    found = normed_product(first, x, gain, weight, rows, eps, B, K, C)
    at = tl.program_id(0) * R + tl.arange(0, R)
    for stream in tl.static_range(B):
        gate, up = halves(found[stream], R)
        tl.store(out + stream * F + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty))


@triton.jit
def fused_residual(
    x,  # float32 [B, N]: added to
    inner,  # [B, K]
    weight,  # [N, K]
    N: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """A projection back into the residual stream. A program alone owns its R elements of it."""
    begin(PDL)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    first = tile(weight, rows, 0, K, C)
    wait(PDL)
    found = product(first, inner, weight, rows, B, K, C)
    for stream in tl.static_range(B):
        at = x + stream * N + rows
        tl.store(at, tl.load(at) + found[stream])


@triton.jit
def fused_head(
    x,  # float32 [B, K]
    gain,  # [K]
    weight,  # [N, K]
    logits,  # float32 [B, N]
    eps,
    N: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Final norm and LM head."""
    begin(PDL)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    first = tile(weight, rows, 0, K, C)
    wait(PDL)
    found = normed_product(first, x, gain, weight, rows, eps, B, K, C)
    for stream in tl.static_range(B):
        tl.store(logits + stream * N + rows, found[stream])

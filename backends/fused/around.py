"""What stands around a product that is somebody else's: a linear format's layer takes a bf16 row and gives one.

Streams are rows; one program serves a stream, or a part of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backends.fused.products import begin, wait, whole


@triton.jit
def fused_embed(
    token,  # int64 [B]
    table,  # [vocab, K]
    gain,  # [K]: of the first norm
    x,  # float32 [B, K]
    scaled,  # [B, K]
    counts,  # int64 [COUNTS, stride]: the first norm's squares are written; the others' and the rest begin at 0
    stride,
    COUNTS: tl.constexpr,
    P: tl.constexpr,  # COUNTS rounded up to a power of two
    K: tl.constexpr,
    C: tl.constexpr,  # K rounded up to a power of two
    PDL: tl.constexpr,
):
    """The token's row of the embedding, for the first norm. Grid: streams.

    It is launched behind everything ahead, so what comes up early behind it may read what the step before it wrote.
    """
    begin(PDL)
    stream, columns = tl.program_id(0), tl.arange(0, C)
    row = tl.load(token + stream)
    values = tl.load(table + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    gains = tl.load(gain + columns, mask=columns < K, other=0.0).to(tl.float32)
    tl.store(x + stream * K + columns, values, mask=columns < K)
    tl.store(scaled + stream * K + columns, (values * gains).to(scaled.dtype.element_ty), mask=columns < K)
    one = tl.arange(0, P)
    begun = tl.where(one == 0, whole(tl.sum(values * values, 0)), 0)
    tl.store(counts + one * stride + stream, begun, mask=one < COUNTS)


@triton.jit
def fused_norm(
    x,  # float32 [streams, K]: added to where ADDS
    added,  # [streams, K]
    gain,  # [K]
    out,  # [streams, K]
    eps,
    K: tl.constexpr,
    C: tl.constexpr,  # K rounded up to a power of two
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A layer's output joins the residual stream, which is normed for the next layer. Grid: streams."""
    begin(PDL)
    columns = tl.arange(0, C)
    inside = columns < K
    gains = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    at = tl.program_id(0) * K + columns
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        values += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, values, mask=inside)
    scale = tl.rsqrt(tl.sum(values * values) / K + eps)
    tl.store(out + at, (values * scale * gains).to(out.dtype.element_ty), mask=inside)


@triton.jit
def fused_rotate(
    q,  # [streams, Q * D]: turned in place
    k,  # [streams, KV * D]
    v,
    cos,  # float32 [capacity, D / 2]
    sin,
    length,  # int32 scalar: rows of the cache, without this token's
    keys,  # [streams, KV, capacity, D]
    values,
    capacity,
    Q: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotary positions of q and k; k and v go to this token's row of the cache. Grid: streams, heads."""
    begin(PDL)
    wait(PDL)
    half: tl.constexpr = D // 2
    stream, head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, half)
    row = tl.load(length)
    c, s = tl.load(cos + row * half + place), tl.load(sin + row * half + place)
    if head < Q:
        query = q + stream * (Q * D) + head * D + place
        one, two = tl.load(query).to(tl.float32), tl.load(query + half).to(tl.float32)
        tl.store(query, (one * c - two * s).to(q.dtype.element_ty))
        tl.store(query + half, (two * c + one * s).to(q.dtype.element_ty))
    else:
        group = head - Q
        own = stream * (KV * D) + group * D + place
        first, second = tl.load(k + own).to(tl.float32), tl.load(k + own + half).to(tl.float32)
        out = ((stream * KV + group).to(tl.int64) * capacity + row) * D + place
        tl.store(keys + out, (first * c - second * s).to(keys.dtype.element_ty))
        tl.store(keys + out + half, (second * c + first * s).to(keys.dtype.element_ty))
        tl.store(values + out, tl.load(v + own))
        tl.store(values + out + half, tl.load(v + own + half))


@triton.jit
def fused_silu(
    gate,  # [streams, F]: overwritten with silu(gate) * up
    up,
    F: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """`silu(gate) * up`. Grid: streams, blocks of C columns."""
    begin(PDL)
    wait(PDL)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    at, inside = tl.program_id(0) * F + columns, columns < F
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate + at, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=inside)

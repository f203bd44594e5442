"""The product of a step's few rows of activations with a row-wise int8 weight, as a Triton kernel.

It is bound by the read of the weight, so each byte of that is read once for all streams. A program has ROWS rows of
the weight and walks along them, COLUMNS at a time; its sums are float32 and stay in registers.
"""

import torch
import triton
import triton.language as tl

COLUMNS, WARPS = 1024, 4
"""Eight columns a thread: see `int8_gemv`."""


@triton.jit
def int8_gemv(
    x,  # [STREAMS, K]
    weight,  # int8 [n, K]
    scale,  # [n, 1]
    bias,  # [n], or anything where BIASED is not set
    out,  # [STREAMS, n]
    n,
    BIASED: tl.constexpr,
    STREAMS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`out = x @ weight.T * scale + bias`. Grid: blocks of ROWS."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    # Int8 would be loaded sixteen columns a thread and bf16 eight: activations would change threads at every turn.
    step = tl.max_contiguous(tl.arange(0, COLUMNS), 8)
    sums = ()
    for _ in tl.static_range(STREAMS):
        sums = sums + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for start in range(0, K, COLUMNS):
        columns = start + step
        at = rows[:, None].to(tl.int64) * K + columns[None, :]
        wide = tl.load(weight + at, mask=inside[:, None] & (columns < K)[None, :], other=0).to(tl.float32)
        grown = ()
        for stream in tl.static_range(STREAMS):
            values = tl.load(x + stream * K + columns, mask=columns < K, other=0.0).to(tl.float32)
            grown = grown + (sums[stream] + wide * values[None, :],)
        sums = grown
    scales = tl.load(scale + rows, mask=inside, other=0.0).to(tl.float32)
    biases = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32) if BIASED else 0.0
    for stream in tl.static_range(STREAMS):
        found = tl.sum(sums[stream], 1) * scales + biases
        tl.store(out + stream * n + rows, found.to(out.dtype.element_ty), mask=inside)


def gemv(x, weight, scale, bias):
    """`[..., K]` to `[..., n]` in the dtype of `x`, for one to eight rows of it; `bias` may be `None`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    (streams, k), n = flat.shape, len(weight)
    rows = min(4, 8 // triton.next_power_of_2(streams))  # 64 registers of sums a thread at most
    # A new one each time: a body may overwrite what it gets.
    out = torch.empty(streams, n, dtype=x.dtype, device=x.device)
    int8_gemv[(triton.cdiv(n, rows),)](
        *(flat, weight, scale, scale if bias is None else bias, out, n),
        **{"BIASED": bias is not None, "STREAMS": streams, "K": k},
        **{"ROWS": rows, "COLUMNS": COLUMNS, "num_warps": WARPS},
    )
    return out.view(*x.shape[:-1], n)

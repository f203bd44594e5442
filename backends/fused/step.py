"""The decode step, launch by launch: what to read first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from backends.fused.around import fused_embed, fused_norm, fused_rotate, fused_silu
from backends.fused.attention import fused_attend, fused_combine
from backends.fused.products import fused_head, fused_qkv, fused_residual, fused_swiglu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from backends.fused.tiles import Table
    from backends.int4.stacked import Packed
    from registry.api import Architecture

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024
"""Columns of a program that only moves numbers."""


@dataclass(frozen=True)
class Stacked:
    """A block whose weights the step multiplies itself.

    Attributes:
        qkv: `[(q_heads + 2 kv_heads) * head_dim, hidden]`.
        bias: Of `qkv`, or `None`.
        out: `[hidden, q_heads * head_dim]`.
        gate_up: `[2 ffn, hidden]`.
        down: `[hidden, ffn]`.
    """

    qkv: Tensor
    bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Int4:
    """A block of int4 weights, which kernels of their own multiply with the same things fused around.

    Attributes:
        qkv: Members of rotary pairs meet in a tile.
        out: As it is.
        gate_up: Gate and up meet in a tile.
        down: As it is.
    """

    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed


@dataclass(frozen=True)
class Hosted:
    """A block whose products are a linear format's layers, each from `[streams, columns]` to `[streams, rows]`."""

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """The model as the step reads it.

    Attributes:
        blocks: The blocks' products.
        norms: The gains of each block's two norms, `[hidden]`.
        embedding: `[vocab, hidden]`.
        norm: The last norm's gain.
        head: `[vocab, hidden]`, the embedding where it is tied; a packed weight; or a format's layer.
        cos: float32 `[capacity, head_dim / 2]`.
        sin: As `cos`.
    """

    blocks: list[Stacked | Int4 | Hosted]
    norms: list[tuple[Tensor, Tensor]]
    embedding: Tensor
    norm: Tensor
    head: Tensor | Packed | Callable[[Tensor], Tensor]
    cos: Tensor
    sin: Tensor


class Step:
    """The step's launches, its tiles chosen and its activations allocated.

    Args:
        architecture: The model.
        weights: Its tensors.
        keys: `[layers, streams, kv_heads, capacity, head_dim]`.
        values: As `keys`.
        tiles: How kernels cut their work.
    """

    def __init__(
        self, architecture: Architecture, weights: Weights, keys: Tensor, values: Tensor, tiles: Table
    ) -> None:
        a, device = architecture, keys.device
        streams, capacity = keys.shape[1], keys.shape[3]
        self._a, self._weights, self._keys, self._values = a, weights, keys, values
        self._streams, self._capacity = streams, capacity
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        # A kernel may come up while the one ahead still runs: compute capability 9.0 and newer.
        pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._launched: dict[str, Any] = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
        q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
        shapes = {  # rows and columns of the weight, and what a program's rows have to divide
            "qkv": (q + 2 * kv, a.hidden, a.head_dim // 2),
            "out": (a.hidden, q, a.hidden),
            "swiglu": (2 * a.ffn, a.hidden, a.ffn),
            "down": (a.hidden, a.ffn, a.hidden),
            "head": (a.vocab, a.hidden, a.vocab),
        }
        self._tiles = {product: tiles.tile(name, product, *shape) for product, shape in shapes.items()}
        self._parts = tiles.parts(name, capacity, a.kv_heads * streams)

        def room(*shape: int, dtype: torch.dtype = keys.dtype) -> Tensor:
            return torch.empty(streams, *shape, dtype=dtype, device=device)

        parts = self._parts.parts
        self.length = torch.zeros((), dtype=torch.int32, device=device)
        self._x = room(a.hidden, dtype=torch.float32)
        self._q, self._attended, self._inner = room(q), room(q), room(a.ffn)
        self._normed = room(a.hidden)
        self._sums = room(a.q_heads, parts, a.head_dim, dtype=torch.float32)
        self._peaks = room(a.q_heads, parts, 2, dtype=torch.float32)

    def __call__(self, token: Tensor) -> Tensor:
        """One token a stream, int64 `[streams]`; the next one's logits, float32 `[streams, vocab]`."""
        w = self._weights
        self._embed(token)
        pending: Tensor | None = None  # a layer's output that has not joined the residual stream yet
        for index, (block, (before, after)) in enumerate(zip(w.blocks, w.norms, strict=True)):
            keys, values = self._keys[index], self._values[index]
            if isinstance(block, Int4):
                self._int4(block, before, after, keys, values)
            elif isinstance(block, Stacked):
                self._qkv(block, before, keys, values)
                self._attend(self._q, keys, values)
                self._residual("out", self._attended, block.out)
                self._swiglu(block, after)
                self._residual("down", self._inner, block.down)
            else:
                normed = self._norm(before, pending)
                query = block.q(normed)
                self._rotate(query, block.k(normed), block.v(normed), keys, values)
                self._attend(query, keys, values)
                normed = self._norm(after, block.out(self._attended))
                pending = block.down(self._silu(block.gate(normed), block.up(normed)))
        if callable(w.head):
            return w.head(self._norm(w.norm, pending)).float()
        if pending is not None:
            self._norm(w.norm, pending)
        return self._head()

    def _int4(self, block: Int4, before: Tensor, after: Tensor, keys: Tensor, values: Tensor) -> None:
        from backends.int4.product import extension

        kernel, w, eps = extension(), self._weights, self._a.rms_norm_eps
        qkv, out, gate_up, down = block.qkv, block.out, block.gate_up, block.down
        cached = (w.cos, w.sin, self.length, self._q, keys, values)
        kernel.qkv(self._x, before, eps, qkv.words, qkv.scales, qkv.bias, *cached, *qkv.cut)
        self._attend(self._q, keys, values)
        kernel.residual(self._attended, out.words, out.scales, self._x, *out.cut)
        kernel.swiglu(self._x, after, eps, gate_up.words, gate_up.scales, self._inner, *gate_up.cut)
        kernel.residual(self._inner, down.words, down.scales, self._x, *down.cut)

    def _embed(self, token: Tensor) -> None:
        k = self._a.hidden
        grid = (self._streams, triton.cdiv(k, BLOCK))
        fused_embed[grid](token, self._weights.embedding, self.length, self._x, K=k, C=BLOCK, **self._launched)

    def _qkv(self, block: Stacked, gain: Tensor, keys: Tensor, values: Tensor) -> None:
        a, w, cut = self._a, self._weights, self._tiles["qkv"]
        bias = block.qkv if block.bias is None else block.bias
        heads = {"Q": a.q_heads, "KV": a.kv_heads, "D": a.head_dim, "BIASED": block.bias is not None}
        numbers = (self._capacity, a.rms_norm_eps)
        fused_qkv[(block.qkv.shape[0] // 2 // cut.rows,)](
            *(self._x, gain, block.qkv, bias, w.cos, w.sin, self.length, self._q, keys, values, *numbers),
            **(heads | self._cut("qkv", a.hidden)),
        )

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        a, cut = self._a, self._parts
        heads = {"Q": a.q_heads, "KV": a.kv_heads, "D": a.head_dim, "PARTS": cut.parts, "N": cut.rows}
        fused_attend[(cut.parts, a.kv_heads, self._streams)](
            *(query, keys, values, self.length, self._sums, self._peaks, self._capacity, a.head_dim**-0.5),
            **(heads | {"INTERPRETED": INTERPRETED, "num_warps": cut.warps} | self._launched),
        )
        merged = {"D": a.head_dim, "PARTS": cut.parts, "P": triton.next_power_of_2(cut.parts)}
        grid = (self._streams * a.q_heads,)
        fused_combine[grid](self._sums, self._peaks, self._attended, **merged, **self._launched)

    def _swiglu(self, block: Stacked, gain: Tensor) -> None:
        a, cut = self._a, self._tiles["swiglu"]
        fused_swiglu[(a.ffn // cut.rows,)](
            *(self._x, gain, block.gate_up, self._inner, a.rms_norm_eps),
            **({"F": a.ffn} | self._cut("swiglu", a.hidden)),
        )

    def _residual(self, product: str, inner: Tensor, weight: Tensor) -> None:
        rows, columns = weight.shape
        fused_residual[(rows // self._tiles[product].rows,)](
            self._x, inner, weight, N=rows, **self._cut(product, columns)
        )

    def _head(self) -> Tensor:
        a, w = self._a, self._weights
        logits = torch.empty(self._streams, a.vocab, dtype=torch.float32, device=self._x.device)
        if isinstance(w.head, torch.Tensor):
            fused_head[(a.vocab // self._tiles["head"].rows,)](
                *(self._x, w.norm, w.head, logits, a.rms_norm_eps),
                **({"N": a.vocab} | self._cut("head", a.hidden)),
            )
        elif not callable(w.head):
            from backends.int4.product import extension

            packed = w.head
            extension().logits(self._x, w.norm, a.rms_norm_eps, packed.words, packed.scales, logits, *packed.cut)
        return logits

    def _cut(self, product: str, columns: int) -> dict[str, Any]:
        tile = self._tiles[product]
        cut = {"K": columns, "R": tile.rows, "C": tile.columns, "num_warps": tile.warps}
        return cut | {"B": self._streams} | self._launched

    def _norm(self, gain: Tensor, added: Tensor | None) -> Tensor:
        k = self._a.hidden
        numbers = {"K": k, "C": triton.next_power_of_2(k), "ADDS": added is not None, "num_warps": 8}
        arrived = self._normed if added is None else added
        fused_norm[(self._streams,)](
            *(self._x, arrived, gain, self._normed, self._a.rms_norm_eps), **(numbers | self._launched)
        )
        return self._normed

    def _rotate(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        a, w = self._a, self._weights
        fused_rotate[(self._streams, a.q_heads + a.kv_heads)](
            *(q, k, v, w.cos, w.sin, self.length, keys, values, self._capacity),
            **({"Q": a.q_heads, "KV": a.kv_heads, "D": a.head_dim, "num_warps": 1} | self._launched),
        )

    def _silu(self, gate: Tensor, up: Tensor) -> Tensor:
        grid = (self._streams, triton.cdiv(self._a.ffn, BLOCK))
        fused_silu[grid](gate, up, F=self._a.ffn, C=BLOCK, **self._launched)
        return gate

"""The decode step, launch by launch: what to read first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from backends.fused.around import fused_embed, fused_norm, fused_rotate, fused_silu
from backends.fused.attention import fused_attend, fused_combine
from backends.fused.choice import fused_best, fused_choose
from backends.fused.products import fused_head, fused_qkv, fused_residual, fused_swiglu
from backends.tiles import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from backends.fused.tiles import Tiles
    from backends.int4.kernel.launches import Launches
    from backends.int4.stacked import Stored
    from registry.api import Architecture

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024
"""Columns of a program that only moves or compares numbers."""


@dataclass(frozen=True)
class Stacked:
    """A block whose weights the step multiplies itself: bf16 ones by Triton's kernels, int4 ones by CUDA C++.

    Attributes:
        qkv: `[(q_heads + 2 kv_heads) * head_dim, hidden]`; int4: members of rotary pairs meet in a tile.
        bias: Of `qkv`, or `None`; an int4 weight has its own.
        out: `[hidden, q_heads * head_dim]`.
        gate_up: `[2 ffn, hidden]`; int4: gate and up meet in a tile.
        down: `[hidden, ffn]`.
    """

    qkv: Tensor | Stored
    bias: Tensor | None
    out: Tensor | Stored
    gate_up: Tensor | Stored
    down: Tensor | Stored


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
        head: `[vocab, hidden]`, the embedding where it is tied; an int4 weight; or a format's layer.
        cos: float32 `[capacity, head_dim / 2]`.
        sin: As `cos`.
    """

    blocks: list[Stacked | Hosted]
    norms: list[tuple[Tensor, Tensor]]
    embedding: Tensor
    norm: Tensor
    head: Tensor | Stored | Callable[[Tensor], Tensor]
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
        launches: How int4 products are launched.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        keys: Tensor,
        values: Tensor,
        tiles: Tiles,
        launches: Launches,
    ) -> None:
        a, device = architecture, keys.device
        streams, capacity = keys.shape[1], keys.shape[3]
        self._a, self._weights, self._keys, self._values = a, weights, keys, values
        self._streams, self._capacity = streams, capacity
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        # A kernel may come up while the one ahead still runs: compute capability 9.0 and newer.
        pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._pdl: dict[str, Any] = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
        q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
        shapes = {  # rows and columns of the weight, and what a program's rows have to divide
            "qkv": (q + 2 * kv, a.hidden, a.head_dim // 2),
            "out": (a.hidden, q, a.hidden),
            "swiglu": (2 * a.ffn, a.hidden, a.ffn),
            "down": (a.hidden, a.ffn, a.hidden),
            "head": (a.vocab, a.hidden, a.vocab),
        }
        self._tiles = {
            product: tiles.tile(Place(name, product, rows, columns, streams), unit)
            for product, (rows, columns, unit) in shapes.items()
        }
        self._launches, self._place = launches, str(device)
        self._launched: dict[tuple[int, int], tuple[int, int]] = {}
        self._parts = tiles.parts(name, capacity, a.kv_heads * streams)

        def room(*shape: int, dtype: torch.dtype = keys.dtype) -> Tensor:
            return torch.empty(streams, *shape, dtype=dtype, device=device)

        parts = self._parts.parts
        self.length = torch.zeros((), dtype=torch.int32, device=device)
        self._x = room(a.hidden, dtype=torch.float32)
        self._scaled, self._normed = room(a.hidden), room(a.hidden)
        self._q, self._attended, self._inner = room(q), room(q), room(a.ffn)
        # A row for each norm's squares, and one for each product whose blocks take tiles as they come. A row begins
        # at a multiple of sixteen bytes, which kernels are compiled for.
        norms, taken = 2 * a.layers + 1, a.layers + 1
        self._counts = torch.zeros(norms + taken, 2 * triton.cdiv(streams, 2), dtype=torch.int64, device=device)
        self._squares, self._tickets = list(self._counts[:norms]), list(self._counts[norms:])
        self._sums = room(a.q_heads, parts, a.head_dim, dtype=torch.float32)
        self._peaks = room(a.q_heads, parts, 2, dtype=torch.float32)
        self._best = room(triton.cdiv(a.vocab, BLOCK), dtype=torch.int64)

    def __call__(self, token: Tensor) -> Tensor:
        """One token a stream, int64 `[streams]`; the next one's logits, float32 `[streams, vocab]`."""
        w = self._weights
        self._embed(token)
        pending: Tensor | None = None  # a layer's output that has not joined the residual stream yet
        for index, (block, (before, after)) in enumerate(zip(w.blocks, w.norms, strict=True)):
            if isinstance(block, Hosted):
                normed = self._norm(before, pending)
                query, key, value = (layer(normed).contiguous() for layer in (block.q, block.k, block.v))
                self._rotate(index, query, key, value)
                self._attend(index, query)
                normed = self._norm(after, block.out(self._attended).contiguous())
                gate, up = (layer(normed).contiguous() for layer in (block.gate, block.up))
                pending = block.down(self._silu(gate, up)).contiguous()
                continue
            following = w.norms[index + 1][0] if index + 1 < len(w.norms) else w.norm
            self._qkv(index, block)
            self._attend(index, self._q)
            self._residual("out", self._attended, block.out, after, self._squares[2 * index + 1])
            self._swiglu(index, block.gate_up)
            self._residual("down", self._inner, block.down, following, self._squares[2 * index + 2])
        if callable(w.head):
            return w.head(self._norm(w.norm, pending)).float().contiguous()
        if pending is not None:
            return self._head(self._norm(w.norm, pending), None)
        return self._head(self._scaled, self._squares[-1])

    def choose(self, logits: Tensor, token: Tensor) -> None:
        """The first of each stream's largest logits, float32 `[streams, vocab]`, into int64 `[streams]`."""
        streams, parts = self._best.shape
        fused_best[(parts, streams)](logits, self._best, logits.shape[1], parts, C=BLOCK, **self._pdl)
        fused_choose[(streams,)](self._best, token, parts, P=triton.next_power_of_2(parts), **self._pdl)

    def _embed(self, token: Tensor) -> None:
        w, k, counts = self._weights, self._a.hidden, self._counts
        rows = {"COUNTS": len(counts), "P": triton.next_power_of_2(len(counts))}
        # Behind everything ahead of it: what comes up early behind it may read what the step before wrote.
        fused_embed[(self._streams,)](
            *(token, w.embedding, w.norms[0][0], self._x, self._scaled, counts, counts.shape[1]),
            **(rows | {"K": k, "C": triton.next_power_of_2(k), "PDL": self._pdl["PDL"], "num_warps": 8}),
        )

    def _qkv(self, index: int, block: Stacked) -> None:
        a, w, weight, eps = self._a, self._weights, block.qkv, self._a.rms_norm_eps
        normed = (self._scaled, self._squares[2 * index])
        cached = (w.cos, w.sin, self.length, self._q, self._keys[index], self._values[index])
        if isinstance(weight, torch.Tensor):
            heads = {"Q": a.q_heads, "KV": a.kv_heads, "D": a.head_dim, "BIASED": block.bias is not None}
            fused_qkv[(weight.shape[0] // 2 // self._tiles["qkv"].rows,)](
                *(*normed, weight, weight if block.bias is None else block.bias, *cached, self._capacity, eps),
                **(heads | self._cut("qkv", a.hidden)),
            )
        else:
            self._int4.qkv(*normed, eps, weight.words, weight.scales, weight.bias, *cached, *self._launch(weight))

    def _attend(self, index: int, query: Tensor) -> None:
        a, cut, keys, values = self._a, self._parts, self._keys[index], self._values[index]
        heads = {"Q": a.q_heads, "KV": a.kv_heads, "D": a.head_dim, "PARTS": cut.parts, "N": cut.rows}
        fused_attend[(cut.parts, a.kv_heads, self._streams)](
            *(query, keys, values, self.length, self._sums, self._peaks, self._capacity, a.head_dim**-0.5),
            **(heads | {"INTERPRETED": INTERPRETED, "num_warps": cut.warps} | self._pdl),
        )
        merged = {"D": a.head_dim, "PARTS": cut.parts, "P": triton.next_power_of_2(cut.parts)}
        fused_combine[(self._streams * a.q_heads,)](
            *(self._sums, self._peaks, self._attended, self.length),
            **(merged | {"LAST": index + 1 == a.layers} | self._pdl),
        )

    def _swiglu(self, index: int, weight: Tensor | Stored) -> None:
        a, eps, squares = self._a, self._a.rms_norm_eps, self._squares[2 * index + 1]
        if isinstance(weight, torch.Tensor):
            fused_swiglu[(a.ffn // self._tiles["swiglu"].rows,)](
                *(self._scaled, squares, weight, self._inner, eps), **({"F": a.ffn} | self._cut("swiglu", a.hidden))
            )
        else:
            stored = (weight.words, weight.scales)
            taken = (self._tickets[index], *self._launch(weight))
            self._int4.swiglu(self._scaled, squares, eps, *stored, self._inner, *taken)

    def _residual(self, product: str, inner: Tensor, weight: Tensor | Stored, gain: Tensor, squares: Tensor) -> None:
        joined = (gain, self._scaled, squares)
        if isinstance(weight, torch.Tensor):
            rows, columns = weight.shape
            fused_residual[(rows // self._tiles[product].rows,)](
                self._x, inner, weight, *joined, N=rows, **self._cut(product, columns)
            )
        else:
            self._int4.residual(inner, weight.words, weight.scales, self._x, *joined, *self._launch(weight))

    def _head(self, x: Tensor, squares: Tensor | None) -> Tensor:
        """Logits of what the last norm's product reads; of what is normed already where there are no squares."""
        a, head = self._a, self._weights.head
        logits = torch.empty(self._streams, a.vocab, dtype=torch.float32, device=x.device)
        if isinstance(head, torch.Tensor):
            fused_head[(a.vocab // self._tiles["head"].rows,)](
                *(x, self._squares[-1] if squares is None else squares, head, logits, a.rms_norm_eps),
                **({"NORMED": squares is None, "N": a.vocab} | self._cut("head", a.hidden)),
            )
        elif not callable(head):
            stored = (head.words, head.scales)
            taken = (self._tickets[-1], *self._launch(head))
            self._int4.logits(x, squares, a.rms_norm_eps, *stored, logits, *taken)
        return logits

    @property
    def _int4(self) -> Any:
        from backends.int4.kernel.loader import extension

        return extension()

    def _launch(self, weight: Stored) -> tuple[int, int]:
        shape = weight.words.shape[0], weight.words.shape[1]
        if shape not in self._launched:  # a table is asked once a shape, not once a launch
            self._launched[shape] = self._launches.launch(self._place, *shape, self._streams)
        return self._launched[shape]

    def _cut(self, product: str, columns: int) -> dict[str, Any]:
        tile = self._tiles[product]
        cut = {"K": columns, "R": tile.rows, "C": tile.columns, "DEPTH": tile.depth, "num_warps": tile.warps}
        return cut | {"B": self._streams} | self._pdl

    def _norm(self, gain: Tensor, added: Tensor | None) -> Tensor:
        k = self._a.hidden
        numbers = {"K": k, "C": triton.next_power_of_2(k), "ADDS": added is not None, "num_warps": 8}
        arrived = self._normed if added is None else added
        fused_norm[(self._streams,)](
            *(self._x, arrived, gain, self._normed, self._a.rms_norm_eps), **(numbers | self._pdl)
        )
        return self._normed

    def _rotate(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        a, w = self._a, self._weights
        cached = (self._keys[index], self._values[index], self._capacity)
        fused_rotate[(self._streams, a.q_heads + a.kv_heads)](
            *(q, k, v, w.cos, w.sin, self.length, *cached),
            **({"Q": a.q_heads, "KV": a.kv_heads, "D": a.head_dim, "num_warps": 1} | self._pdl),
        )

    def _silu(self, gate: Tensor, up: Tensor) -> Tensor:
        grid = (self._streams, triton.cdiv(self._a.ffn, BLOCK))
        fused_silu[grid](gate, up, F=self._a.ffn, C=BLOCK, **self._pdl)
        return gate

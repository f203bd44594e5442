"""gpt-fast's recipe rebuilt: a plain PyTorch decoder that torch.compile fuses, as a bar for backend=fused.

    python bench/gpt_fast_recipe.py [--model qwen2.5-7b] [--context 2048] [--mode reduce-overhead] [--sessions 3]

What makes that recipe (pytorch-labs/gpt-fast, 2023): q, k and v in one product, gate and up in another, a static
cache written in place, no branch on the host, and the whole step under torch.compile with CUDA graphs and
coordinate-descent tuning. Random weights in bf16, batch 1. Prints one JSON line: the medians of 30 steps after 5,
wall clock with a synchronise around each step, one for each session (here another pass over the same positions).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from registry.api import Architecture
from registry.compose import Composer
from registry.plugins import Catalog

WARMUP, MEASURED = 5, 30
COMPILING = 8
"""Steps in which everything is compiled and recorded."""


class Block(nn.Module):
    """One decoder block on one token a stream."""

    def __init__(self, a: Architecture, capacity: int) -> None:
        super().__init__()
        self.a = a
        q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
        self.qkv = nn.Linear(a.hidden, q + 2 * kv, bias=a.qkv_bias)
        self.out = nn.Linear(q, a.hidden, bias=False)
        self.gate_up = nn.Linear(a.hidden, 2 * a.ffn, bias=False)
        self.down = nn.Linear(a.ffn, a.hidden, bias=False)
        self.before, self.after = (nn.Parameter(torch.ones(a.hidden)) for _ in range(2))
        self.register_buffer("keys", torch.zeros(1, a.kv_heads, capacity, a.head_dim))
        self.register_buffer("values", torch.zeros(1, a.kv_heads, capacity, a.head_dim))

    def forward(self, x: Tensor, position: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """`[1, 1, hidden]` to the same."""
        a = self.a
        q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
        h = rms_norm(x, (a.hidden,), self.before, a.rms_norm_eps)
        heads = self.qkv(h).split([q, kv, kv], -1)
        query, key, value = (part.view(1, 1, -1, a.head_dim).transpose(1, 2) for part in heads)
        self.keys.index_copy_(2, position, rotate(key, *rotation))
        self.values.index_copy_(2, position, value)
        keys, values = (cache.repeat_interleave(a.group_size, 1) for cache in (self.keys, self.values))
        out = scaled_dot_product_attention(rotate(query, *rotation), keys, values, attn_mask=mask)
        x = x + self.out(out.transpose(1, 2).reshape(1, 1, q))
        gate, up = self.gate_up(rms_norm(x, (a.hidden,), self.after, a.rms_norm_eps)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Decoder(nn.Module):
    """Embedding, blocks, head, and greedy choice."""

    def __init__(self, a: Architecture, capacity: int) -> None:
        super().__init__()
        self.a = a
        self.embedding = nn.Embedding(a.vocab, a.hidden)
        self.blocks = nn.ModuleList(Block(a, capacity) for _ in range(a.layers))
        self.norm = nn.Parameter(torch.ones(a.hidden))
        self.head = nn.Linear(a.hidden, a.vocab, bias=False)
        angles = torch.arange(capacity)[:, None] * a.rope_theta ** -(torch.arange(0, a.head_dim, 2) / a.head_dim)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.register_buffer("rows", torch.arange(capacity))

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """int64 `[1, 1]` at int64 `[1]`; the next token, `[1, 1]`."""
        x = self.embedding(token)
        rotation = self.cos[position], self.sin[position]
        mask = (self.rows <= position)[None, None, None]
        for block in self.blocks:
            x = block(x, position, rotation, mask)
        return self.head(rms_norm(x, (self.a.hidden,), self.norm, self.a.rms_norm_eps)).argmax(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves paired."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--mode", default="reduce-overhead")
    parser.add_argument("--sessions", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._inductor.config.coordinate_descent_tuning = True
    a = Architecture.of(Composer(Catalog()).cell([f"model={args.model}"]).model)
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode(), torch.device(device):
        decoder = Decoder(a, args.context + WARMUP + MEASURED)
        for tensor in [*decoder.parameters(), *(cache for b in decoder.blocks for cache in (b.keys, b.values))]:
            tensor.normal_(std=0.02)
        step = torch.compile(decoder, mode=args.mode, fullgraph=True)
        token = torch.zeros(1, 1, dtype=torch.int64)
        medians = []
        for _ in range(COMPILING):
            token = step(token, torch.tensor([args.context])).clone()
        for _ in range(args.sessions):
            times = []
            for number in range(WARMUP + MEASURED):
                position = torch.tensor([args.context + number])
                synchronise(device)
                start = time.perf_counter_ns()
                token = step(token, position).clone()
                synchronise(device)
                times.append((time.perf_counter_ns() - start) / 1e6)
            medians.append(statistics.median(times[WARMUP:]))
    print(json.dumps({"median_ms": statistics.median(medians), "medians_ms": medians, "mode": args.mode}))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

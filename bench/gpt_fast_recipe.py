"""gpt-fast's recipe rebuilt: a plain PyTorch decoder that torch.compile fuses, as a bar for backend=fused.

    python bench/gpt_fast_recipe.py [--model qwen2.5-7b] [--context 2048] [--mode reduce-overhead] [--sessions 3]

What makes that recipe (pytorch-labs/gpt-fast, 2023): q, k and v in one product, gate and up in another, a static
cache written in place, no branch on the host, and the whole step under torch.compile with CUDA graphs and
coordinate-descent tuning. Random weights in bf16, batch 1. Holds the GPU as a sweep does. Prints one JSON line: the
medians of 30 steps after 5, wall clock with a synchronise around each step, one for each session, which is a process
of its own; and on what they were measured. Ends without one if CUDA graphs that the mode promises were not recorded,
or if anything was compiled while steps were timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from provenance import provenance
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from backends.fused.tree import rotary
from registry.api import Architecture
from registry.compiling import Compilations
from registry.compose import Composer
from registry.device_lock import WAIT, alone_on
from registry.hardware import find_device
from registry.plugins import Catalog
from registry.schema import COMPILE_MODES

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
        # Angles are float32, whatever the default dtype: in bf16 a position beyond 256 is no whole number any more.
        cos, sin = rotary(a, capacity, str(torch.get_default_device()))
        self.register_buffer("cos", cos.repeat(1, 2).to(torch.get_default_dtype()))
        self.register_buffer("sin", sin.repeat(1, 2).to(torch.get_default_dtype()))
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


def session(args: argparse.Namespace) -> float:
    """The median of the measured steps, ms."""
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
        for _ in range(COMPILING):
            token = step(token, torch.tensor([args.context])).clone()
        compiled, times = Compilations.now(), []
        for number in range(WARMUP + MEASURED):
            position = torch.tensor([args.context + number])
            synchronise(device)
            start = time.perf_counter_ns()
            token = step(token, position).clone()
            synchronise(device)
            times.append((time.perf_counter_ns() - start) / 1e6)
    check(compiled, Compilations.now(), graphs=device == "cuda" and COMPILE_MODES[args.mode])
    return statistics.median(times[WARMUP:])


def check(compiled: Compilations, now: Compilations, graphs: bool) -> None:
    """Whether what was timed is the recipe.

    Args:
        compiled: What torch.compile had done before the first timed step.
        now: After the last.
        graphs: Whether it was to record CUDA graphs.
    """
    if now != compiled:
        raise SystemExit(f"compiled or recorded while steps were timed: {now.since(compiled)}")
    if graphs and (now.skips or not now.recorded):
        raise SystemExit(f"no CUDA graph of the whole step: {now.skips} skipped, {now.recorded} inputs recorded")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--mode", choices=[*COMPILE_MODES], default="reduce-overhead")
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one session, in this process
    args = parser.parse_args()
    if args.alone:
        print(session(args))
        return
    device, medians = find_device(), []
    with alone_on(device, WAIT, partial(print, file=sys.stderr)) as held:
        for _ in range(args.sessions):
            command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
            given = () if held is None else (held,)  # the lock falls with the last of those that hold it
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, pass_fds=given)
            medians.append(float(done.stdout.splitlines()[-1]))
    figures = {"median_ms": statistics.median(medians), "medians_ms": medians}
    told = {"model": args.model, "context": args.context, "mode": args.mode}
    print(json.dumps(figures | told | provenance(device)))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Tune how backend=fused cuts its work for a model on this GPU, and tell where its step goes, kernel by kernel.

    python bench/fused_tiles.py tune [--model qwen2.5-7b] [--quant none|int4] [--context 2048] [--batch 1]
    python bench/fused_tiles.py account [--model qwen2.5-7b] [--quant none|int4] [--context 2048] [--batch 1]

`tune` changes one product's cut at a time and keeps what makes the captured step shorter by more than half a percent
twice, in the chain and not alone: what is best alone is not best behind another kernel. It starts with what
`backends/fused/tiles.yaml` and `backends/int4/kernel/launches.yaml` have and writes what it found there. `account`
replays the whole step with each kind of launch left out in turn, whole steps between: what the step is shorter by is
what that kind takes in the chain, and its bytes over that time are its GB/s there. Leaving a launch out changes what
is computed and not what the others read. Its last row is a step whose kernels do not come up early.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime.errors import OutOfResources

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.fused import tiles
from backends.fused.body import FusedBackend
from backends.fused.tiles import PRODUCTS, VECTOR, WARP, Parts, Tile, Tiles
from backends.int4.kernel import launches
from backends.int4.kernel.launches import WARPS, WARPS_A_PROCESSOR, Launch, Launches
from backends.quant.int4 import Int4, Int4Options
from backends.quant.none import NoQuant
from backends.tiles import Place, Table
from registry.api import Architecture, NoOptions, Setup
from registry.capture import capture
from registry.compose import Composer
from registry.measure import read_bandwidth
from registry.outcome import Refused
from registry.plugins import Catalog
from registry.weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOM = 35
REPLAYS, REPEATS = 20, 3
ROUNDS = 5
"""Of `account`."""
BETTER = 0.995
"""What a step has to come to, over the one before, for a cut to be kept."""
KEPT = 6
"""Candidates of a product that are tried again when the others have changed."""
REGISTERS, THREADS = 65536, 2048
"""Of a processor."""
UNDER_WAY = 48 * 1024
"""Bytes that a processor has to have under way, at least, for a tile to be tried."""
PARTS = [
    Parts(parts, rows, warps)
    for parts, rows, warps in itertools.product((11, 16, 22, 33, 44, 66), (16, 32, 64, 128), (2, 4, 8))
    if rows <= 16 * warps
]
"""Whose tiles fit into registers."""
SERIAL = "each Triton kernel behind the one ahead"
LEFT_OUT = {
    "qkv": "_qkv",
    "attention": "_attend",
    "out": "_out",
    "swiglu": "_swiglu",
    "down": "_down",
    "head": "_head",
}
"""Of the step's methods, by what `account` tells of; `_out` and `_down` are its `_residual`."""


def bf16_tiles(paired: bool, streams: int, columns: int) -> Iterator[Tile]:
    """Tiles that keep enough bytes under way, as far as registers can be told beforehand."""
    least = UNDER_WAY if streams == 1 else UNDER_WAY // 2
    for rows, warps, depth in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3, 4, 6)):
        own, real = VECTOR, rows * (2 if paired else 1)
        wide = WARP * warps * own
        registers = 28 + own * real * streams + depth * own * (real + streams) // 2
        programs = min(REGISTERS // (registers * WARP * warps), THREADS // (WARP * warps), 32)
        bytes_under_way = programs * depth * real * wide * 2
        if registers <= 200 and wide < 2 * columns and wide * (depth - 1) < columns and bytes_under_way >= least:
            yield Tile(rows, wide, warps, depth)


LAUNCHES = [
    Launch(warps, blocks)
    for warps in WARPS
    for blocks in range(1, WARPS_A_PROCESSOR // warps + 1)
    if warps * blocks >= WARPS_A_PROCESSOR // 3
]
"""Of an int4 product: what keeps a third of a processor's warps or more at work."""


def tables() -> tuple[Tiles, Launches]:
    """What is known so far."""
    return Tiles(tiles.table().known()), Launches(launches.table().known())


def loaded(args: argparse.Namespace, layers: int | None) -> FusedBackend:
    """The body with a cache of a context and its steps, filled with random numbers."""
    architecture = Architecture.of(Composer(Catalog()).cell([f"model={args.model}"]).model)
    setup = Setup(
        architecture.cut(layers) if layers else architecture,
        RandomWeights(0),
        "cuda",
        torch.bfloat16,
        args.batch,
        "static",
        NoQuant(NoOptions()) if args.quant == "none" else Int4(Int4Options(head_bits=args.head_bits)),
        Sdpa(SdpaOptions()),
        NoOptions(),
    )
    backend = FusedBackend(setup)
    backend.load(args.context + ROOM)
    backend._cache.normal_()
    backend.seek(args.context)
    return backend


def zeros(backend: FusedBackend) -> torch.Tensor:
    """A token a stream."""
    return torch.zeros(backend.setup.batch_size, dtype=torch.int64, device=backend.setup.device)


def captured(backend: FusedBackend) -> Any:
    token = zeros(backend)

    def step() -> None:
        backend.decode_step(token)

    return capture("the step", step, step)


def replayed_ms(backend: FusedBackend, graph: Any, context: int) -> float:
    """Replays, back to back: the median of some means."""
    times: list[float] = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(REPEATS):
        backend.seek(context)
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


@dataclass
class Question:
    """What a place may be given.

    Attributes:
        table: Where the answer goes.
        place: Which.
        cuts: What may be.
    """

    table: Table
    place: Place
    cuts: list[Any]


def questions(args: argparse.Namespace, backend: FusedBackend, known: Tiles, launched: Launches) -> list[Question]:
    device, a = torch.cuda.get_device_name(), backend.setup.architecture
    streams = args.batch
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = [(q + 2 * kv, a.hidden), (a.hidden, q), (2 * a.ffn, a.hidden), (a.hidden, a.ffn), (a.vocab, a.hidden)]
    found = []
    for product, (rows, columns) in zip(PRODUCTS, shapes, strict=True):
        if args.quant == "int4" and (product != "head" or args.head_bits == 4):
            found.append(Question(launched, Place(device, launches.PRODUCT, rows, columns, streams), LAUNCHES))
        else:
            cuts = list(bf16_tiles(product in ("qkv", "swiglu"), args.batch, columns))
            found.append(Question(known, Place(device, product, rows, columns, streams), cuts))
    rows = args.context + ROOM
    found.append(Question(known, Place(device, "attention", rows, a.kv_heads * args.batch), PARTS))
    named = (*PRODUCTS, "attention")
    return [one for name, one in zip(named, found, strict=True) if name in args.only]


def compile_some(args: argparse.Namespace, share: int, shares: int) -> int:
    """In a process of its own: one step with each candidate, so that Triton's cache has its kernels."""
    with torch.inference_mode():
        backend = loaded(args, 1)
        known, launched = tables()
        asked = [one for one in questions(args, backend, known, launched) if isinstance(one.table, Tiles)]
        token, made = zeros(backend), 0
        for number in range(share, max((len(one.cuts) for one in asked), default=0), shares):
            for one in asked:
                if number < len(one.cuts):
                    known.set(one.place, one.cuts[number])
                    made += 1
            backend.cut(known, launched)
            backend.seek(args.context)
            with contextlib.suppress(OutOfResources):
                backend.decode_step(token)
            torch.cuda.synchronize()
        return made


def tune(args: argparse.Namespace) -> None:
    backend = loaded(args, args.layers)
    known, launched = tables()
    asked = questions(args, backend, known, launched)
    start, shares = time.monotonic(), min(14, max(1, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(shares, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(compile_some, [args] * shares, range(shares), [shares] * shares)
        print(f"compiled {sum(made)} kernels in {time.monotonic() - start:.0f} s", flush=True)

    def timed() -> float:
        backend.cut(known, launched)
        try:
            return replayed_ms(backend, captured(backend), args.context)
        except (OutOfResources, Refused) as error:  # too much shared memory, say: no candidate
            print(error)
            return float("inf")

    timed()
    best = timed()
    print(f"{best:.4f} ms as it is, {backend.setup.architecture.layers} blocks", flush=True)
    for turn in range(args.passes):
        for one in asked:
            was = one.table.exactly(one.place)
            kept: Any = None
            found = []
            for cut in one.cuts:
                one.table.set(one.place, cut)
                found.append((timed(), cut))
                if found[-1][0] >= best * BETTER or timed() >= best * BETTER:
                    continue
                best, kept = found[-1][0], cut
                print(f"{best:.4f} ms with {one.place.product} {cut}", flush=True)
            found.sort(key=lambda pair: pair[0])
            if turn == 0:
                print(one.place.product, "nearest:", *(f"{ms:.4f} {cut}" for ms, cut in found[:4]), sep="\n  ")
            one.cuts = [cut for _, cut in found[:KEPT]]
            one.table.restore(one.place, vars(kept) if kept else was)
            timed()
            best = timed()
    known.write(tiles.TABLE)
    launched.write(launches.TABLE)


def account(args: argparse.Namespace) -> None:
    backend = loaded(args, None)
    backend.cut(*tables())
    a = backend.setup.architecture
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    numbers = {
        "qkv": a.layers * (q + 2 * kv) * a.hidden,
        "attention": a.kv_bytes_per_token(1) * args.context * args.batch,
        "out": a.layers * a.hidden * q,
        "swiglu": a.layers * 2 * a.ffn * a.hidden,
        "down": a.layers * a.hidden * a.ffn,
        "head": a.vocab * a.hidden,
    }
    step: Any = backend.step
    logits = step._head(step._scaled, step._squares[-1])
    residual = step._residual
    left_out: list[str] = []
    step._residual = lambda product, *rest: None if f"_{product}" in left_out else residual(product, *rest)
    kept: dict[str, Callable[..., Any]] = {
        name: getattr(step, name) for name in ("_qkv", "_attend", "_swiglu", "_head")
    }
    plain, graphs = captured(backend), {}
    for what, name in LEFT_OUT.items():
        left_out[:] = [name]
        if name in kept:
            setattr(step, name, lambda *_: logits)
        graphs[what] = captured(backend)
        for name, method in kept.items():
            setattr(step, name, method)
    left_out.clear()
    early, step._pdl = step._pdl, {"PDL": False}
    graphs[SERIAL] = captured(backend)
    step._pdl = early

    def ms(graph: Any) -> float:
        return replayed_ms(backend, graph, args.context)

    ms(plain)
    wholes: list[float] = [ms(plain)]
    shorter: dict[str, list[float]] = {what: [] for what in graphs}
    for _ in range(ROUNDS):
        for what, graph in graphs.items():
            less = ms(graph)
            wholes.append(ms(plain))
            shorter[what].append(statistics.mean(wholes[-2:]) - less)
    whole = statistics.median(wholes)
    rows = {"whole": {"ms": whole, "read_gbs": read_bandwidth("cuda")}}
    for what in LEFT_OUT:
        taken = statistics.median(shorter[what])
        packed = args.quant == "int4" and what != "attention" and (what != "head" or args.head_bits == 4)
        gb = numbers[what] * (0.5 + 2 / 128 if packed else 2) / 1e9
        rows[what] = {"ms": taken, "gb": gb, "gbs": gb / taken * 1e3}
    rows["rest"] = {"ms": whole - sum(row["ms"] for name, row in rows.items() if name != "whole")}
    rows[SERIAL] = {"ms": whole - statistics.median(shorter[SERIAL])}
    for name, row in rows.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    print(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("tune", "account"))
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--quant", choices=("none", "int4"), default="none")
    parser.add_argument("--head-bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=(*PRODUCTS, "attention"), default=(*PRODUCTS, "attention"))
    args = parser.parse_args()
    with torch.inference_mode():
        {"tune": tune, "account": account}[args.what](args)


if __name__ == "__main__":
    main()

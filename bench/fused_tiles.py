"""Tune how backend=fused cuts its work for a model on this GPU.

    python bench/fused_tiles.py [--model qwen2.5-7b] [--quant none] [--context 2048] [--batch 1]

Changes one product's cut at a time and keeps what makes the captured step shorter by more than half a percent twice,
in the chain and not alone: what is best alone is not best behind another kernel. It starts with what
`backends/fused/tiles.yaml` and `backends/int4/kernel/launches.yaml` have and writes what it found there.
`bench/fused_account.py` tells where the step's time then goes. The GPU is held as a sweep holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from replays import ROOM, captured, replayed_ms, zeros
from triton.runtime.errors import OutOfResources

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.fused import tiles
from backends.fused.body import FusedBackend
from backends.fused.tiles import PRODUCTS, VECTOR, WARP, Parts, Tile, Tiles
from backends.int4.kernel import launches
from backends.int4.kernel.launches import WARPS, Launch, Launches, resident
from backends.quant.int4 import Int4
from backends.tiles import Place, Table
from registry.api import HEAD, Architecture, LinearFormat, NoOptions, Setup
from registry.compose import Composer
from registry.device_lock import WAIT, alone_on
from registry.hardware import find_device
from registry.outcome import Refused
from registry.plugins import Catalog
from registry.weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Iterator

TUNED = ("none", "int4", "int4-head4")
"""Names of conf/quant whose products the fused step multiplies itself."""
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


LEAST_WARPS = 10
"""Of a processor: a third of those that it has room for."""
LAUNCHES = [
    Launch(warps, blocks)
    for warps in WARPS
    for blocks in range(1, resident(warps) + 1)
    if warps * blocks >= LEAST_WARPS
]
"""Of an int4 product: what keeps enough of a processor's warps at work, and has room on it."""


def tables() -> tuple[Tiles, Launches]:
    """What is known so far."""
    return Tiles(tiles.table().known()), Launches(launches.table().known())


def form(quant: str) -> LinearFormat:
    """The format and the options that conf/quant has under this name."""
    chosen = Composer(Catalog()).cell([f"quant={quant}"]).quant
    plugin = Catalog().load("quant", chosen.plugin)
    return plugin(plugin.Options(**chosen.options))


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
        form(args.quant),
        Sdpa(SdpaOptions()),
        NoOptions(),
    )
    backend = FusedBackend(setup)
    backend.load(args.context + ROOM)
    backend._cache.normal_()
    backend.seek(args.context)
    return backend


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


def questions(
    args: argparse.Namespace, a: Architecture, device: str, known: Tiles, launched: Launches
) -> list[Question]:
    """Every place that a step of these arguments looks up, by the device's name."""
    streams = args.batch
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = [(q + 2 * kv, a.hidden), (a.hidden, q), (2 * a.ffn, a.hidden), (a.hidden, a.ffn), (a.vocab, a.hidden)]
    linear, found = form(args.quant), []
    for product, (rows, columns) in zip(PRODUCTS, shapes, strict=True):
        if isinstance(linear, Int4) and (product != "head" or HEAD not in linear.keeps):
            found.append(Question(launched, Place(device, launches.PRODUCT, rows, columns, streams), LAUNCHES))
        else:
            cuts = list(bf16_tiles(product in ("qkv", "swiglu"), streams, columns))
            found.append(Question(known, Place(device, product, rows, columns, streams), cuts))
    rows = args.context + ROOM
    found.append(Question(known, Place(device, "attention", rows, a.kv_heads * streams), PARTS))
    named = (*PRODUCTS, "attention")
    return [one for name, one in zip(named, found, strict=True) if name in args.only]


def compile_some(args: argparse.Namespace, share: int, shares: int) -> int:
    """In a process of its own: one step with each candidate, so that Triton's cache has its kernels."""
    with torch.inference_mode():
        backend = loaded(args, 1)
        known, launched = tables()
        places = questions(args, backend.setup.architecture, torch.cuda.get_device_name(), known, launched)
        asked = [one for one in places if isinstance(one.table, Tiles)]
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
    asked = questions(args, backend.setup.architecture, torch.cuda.get_device_name(), known, launched)
    if any(isinstance(one.table, Tiles) for one in asked):
        start, shares = time.monotonic(), min(14, max(1, (os.cpu_count() or 1) - 2))
        with ProcessPoolExecutor(shares, multiprocessing.get_context("spawn")) as pool:
            made = pool.map(compile_some, [args] * shares, range(shares), [shares] * shares)
            print(f"compiled {sum(made)} kernels in {time.monotonic() - start:.0f} s", flush=True)

    def timed() -> float:
        backend.cut(known, launched)
        try:
            return replayed_ms(captured(backend), lambda: backend.seek(args.context))
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


def main() -> None:
    every = (*PRODUCTS, "attention")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b", help="a name of conf/model")
    parser.add_argument("--quant", choices=TUNED, default="none", help="whose products are cut")
    parser.add_argument("--context", type=int, default=2048, help="tokens that a step attends to")
    parser.add_argument("--batch", type=int, default=1, help="streams")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the step that is timed, not all for speed")
    parser.add_argument("--passes", type=int, default=2, help="how often each product is looked at")
    parser.add_argument("--only", nargs="+", choices=every, default=every, help="which launches; all if left out")
    args = parser.parse_args()
    device = find_device()
    if device.kind != "cuda":
        parser.error("this machine has no CUDA device to tune for")
    with torch.inference_mode(), alone_on(device, WAIT, partial(print, file=sys.stderr)):
        tune(args)


if __name__ == "__main__":
    main()

"""Tune the tiles of backend=fused for a model on this GPU, and tell where its step goes, kernel by kernel.

    python bench/fused_tiles.py tune [--model qwen2.5-7b] [--context 2048] [--batch 1] [--layers 8] [--passes 2]
    python bench/fused_tiles.py account [--model qwen2.5-7b] [--context 2048] [--batch 1]

`tune` changes one product's tile at a time and keeps what makes the captured step shorter by more than half a
percent, in the chain and not alone: a tile that is best alone is not best behind another kernel. It starts with what
`backends/fused/tiles.yaml` has and writes what it found there. `account` replays the whole step with each kind of
launch left out in turn: what the step is shorter by is what that kind takes in the chain, and its bytes over that
time are its GB/s there. Leaving a launch out changes what is computed and not what the others read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from typing import TYPE_CHECKING, Any

import torch

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.fused.body import FusedBackend
from backends.fused.tiles import PRODUCTS, TABLE, Parts, Place, Table, Tile, table
from backends.quant.none import NoQuant
from registry.api import Architecture, NoOptions, Setup
from registry.capture import capture
from registry.compose import Composer
from registry.measure import read_bandwidth
from registry.plugins import Catalog
from registry.weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Callable

ROOM = 35
REPLAYS, REPEATS = 20, 5
BETTER = 0.995
"""What a step has to come to, over the one before, for a tile to be kept."""
TILES = [Tile(r, c, w) for r, c, w in itertools.product((1, 2, 4), (512, 1024, 2048, 4096), (2, 4, 8, 16))]
PARTS = [Parts(p, r, w) for p, r, w in itertools.product((8, 16, 33, 66), (32, 64, 128), (4, 8))]
LARGEST = 64
"""Weights that a thread may hold of a tile, of all its rows."""
LAUNCHES = {
    "qkv": ("_qkv",),
    "attention": ("_attend",),
    "out, down": ("_residual",),
    "swiglu": ("_swiglu",),
    "head": ("_head",),
}


def loaded(model: str, context: int, batch: int, layers: int | None) -> FusedBackend:
    """The body with a cache of a context and its steps, filled with random numbers."""
    architecture = Architecture.of(Composer(Catalog()).cell([f"model={model}"]).model)
    setup = Setup(
        architecture.cut(layers) if layers else architecture,
        RandomWeights(0),
        "cuda",
        torch.bfloat16,
        batch,
        "static",
        NoQuant(NoOptions()),
        Sdpa(SdpaOptions()),
        NoOptions(),
    )
    backend = FusedBackend(setup)
    backend.load(context + ROOM)
    backend._cache.normal_()
    backend.seek(context)
    return backend


def median_ms(backend: FusedBackend, context: int, batch: int) -> float:
    """A captured step's replays, back to back: the median of some means."""
    token = torch.zeros(batch, dtype=torch.int64, device="cuda")

    def step() -> None:
        backend.decode_step(token)

    graph = capture("the step", step, step)
    times = []
    for _ in range(REPEATS + 1):
        backend.seek(context)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / REPLAYS)
    return statistics.median(times[1:])


def shapes(a: Architecture) -> dict[str, tuple[int, int]]:
    """Rows and columns of each product's weight."""
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    found = [(q + 2 * kv, a.hidden), (a.hidden, q), (2 * a.ffn, a.hidden), (a.hidden, a.ffn), (a.vocab, a.hidden)]
    return dict(zip(PRODUCTS, found, strict=True))


def tune(args: argparse.Namespace) -> None:
    backend = loaded(args.model, args.context, args.batch, args.layers)
    device, a = torch.cuda.get_device_name(), backend.setup.architecture
    known = Table(table().known())

    def timed(place: Place, tile: Tile | Parts) -> float:
        tried = Table(known.known())
        tried.set(place, tile)
        backend.cut(tried)
        try:
            return median_ms(backend, args.context, args.batch)
        except Exception as error:  # too much shared memory, say: no candidate
            print(f"{place.product} {tile}: {str(error).splitlines()[0]}")
            return float("inf")

    best = median_ms(backend, args.context, args.batch)
    print(f"{best:.4f} ms as it is, {a.layers} blocks", flush=True)
    places = {Place(device, product, *shape): TILES for product, shape in shapes(a).items()}
    places[Place(device, "attention", args.context + ROOM, a.kv_heads * args.batch)] = PARTS
    for _, (place, tiles) in itertools.product(range(args.passes), places.items()):
        for tile in tiles:
            paired = 2 if place.product in ("qkv", "swiglu") else 1
            if isinstance(tile, Tile) and paired * tile.rows * tile.columns > LARGEST * 32 * tile.warps:
                continue
            found = timed(place, tile)
            if found < best * BETTER:
                best = found
                known.set(place, tile)
                print(f"{best:.4f} ms with {place.product} {tile}", flush=True)
    write(known)


def write(known: Table) -> None:
    """Into the table's file, below what it says of itself."""
    head = [line for line in TABLE.read_text().splitlines() if line.startswith("#")]

    def flow(mapping: dict[str, Any]) -> str:
        return "{" + ", ".join(f"{key}: {value}" for key, value in mapping.items() if value) + "}"

    rows = [f"- {{place: {flow(row['place'])}, tile: {flow(row['tile'])}}}" for row in known.known()]
    TABLE.write_text("\n".join([*head, *rows]) + "\n")


def account(args: argparse.Namespace) -> None:
    backend = loaded(args.model, args.context, args.batch, None)
    a, whole = backend.setup.architecture, median_ms(backend, args.context, args.batch)
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    weights = {
        "qkv": a.layers * (q + 2 * kv) * a.hidden,
        "attention": a.kv_bytes_per_token(1) * args.context * args.batch,
        "out, down": a.layers * a.hidden * (q + a.ffn),
        "swiglu": a.layers * 2 * a.ffn * a.hidden,
        "head": a.vocab * a.hidden,
    }
    step: Any = backend.step
    logits = step._head()
    rows = {"whole": {"ms": whole, "read_gbs": read_bandwidth("cuda")}}
    for what, names in LAUNCHES.items():
        kept: dict[str, Callable[..., Any]] = {name: getattr(step, name) for name in names}
        for name in names:
            setattr(step, name, lambda *_: logits)
        taken = whole - median_ms(backend, args.context, args.batch)
        for name, method in kept.items():
            setattr(step, name, method)
        rows[what] = {"ms": taken, "gb": 2 * weights[what] / 1e9, "gbs": 2 * weights[what] / 1e6 / taken}
    rows["rest"] = {"ms": whole - sum(row["ms"] for name, row in rows.items() if name != "whole")}
    for name, row in rows.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    print(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("tune", "account"))
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--passes", type=int, default=2)
    args = parser.parse_args()
    with torch.inference_mode():
        {"tune": tune, "account": account}[args.what](args)


if __name__ == "__main__":
    main()

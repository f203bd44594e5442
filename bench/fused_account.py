"""Where a step of backend=fused goes on this GPU, kind of launch by kind of launch.

    python bench/fused_account.py [--model qwen2.5-7b] [--quant none] [--context 2048] [--batch 1] [--out FILE]

`--quant` is a name of conf/quant: `none` and `int4` are multiplied by the step's own kernels, of any other format a
layer is a kind of its own. Replays the whole step with each kind left out in turn, whole steps between: what the step
is shorter by is what that kind takes in the chain, and its bytes over that time are its GB/s there. `rest` is what no
kind takes; the last row is a step whose own kernels do not come up early. Weights are those that a sweep would
measure with, and the GPU is held as a sweep holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from chain import Chain
from provenance import provenance
from replays import ROOM, captured, replayed_ms

from registry.cache import kernel_environment
from registry.compose import Composer
from registry.device_lock import WAIT, alone_on
from registry.hardware import find_device
from registry.measure import read_bandwidth
from registry.plan import Planner
from registry.plugins import Catalog
from registry.worker import Request, build, factory

if TYPE_CHECKING:
    from backends.fused.body import FusedBackend
    from registry.plan import Cell

ROUNDS = 5
WHOLE, REST, SERIAL = "whole", "rest", "each kernel behind the one ahead"


def planned(args: argparse.Namespace) -> Cell:
    """The cell that a sweep would measure."""
    composer = Composer(Catalog())
    chosen = [f"model={args.model}", f"quant={args.quant}", "backend=fused", "execution=cuda_graph"]
    chosen += [f"context={args.context}", f"protocol.batch_size={args.batch}"]
    cell = Planner(composer.catalog, composer.profiles(), find_device()).plan(composer.cell(chosen))
    if cell.refusal:
        raise SystemExit(f"{cell.refusal.reason}. {cell.refusal.remedy}".rstrip(". "))
    return cell


def account(backend: FusedBackend, context: int) -> dict[str, dict[str, float]]:
    """By kind of launch: milliseconds a step, microseconds a block, gigabytes and GB/s."""
    chain = Chain(backend)

    def recorded() -> Any:
        chain.begin(context)  # a capture warms up by steps, for all of which together the cache has no room
        return captured(backend)

    plain, graphs = recorded(), {}
    for kind in chain.kinds:
        with chain.without(kind):
            graphs[kind] = recorded()
    with chain.serial():
        graphs[SERIAL] = recorded()

    def ms(graph: Any) -> float:
        return replayed_ms(graph, partial(chain.begin, context))

    ms(plain)
    wholes: list[float] = [ms(plain)]
    shorter: dict[str, list[float]] = {kind: [] for kind in graphs}
    for _ in range(ROUNDS):
        for kind, graph in graphs.items():
            less = ms(graph)
            wholes.append(ms(plain))
            shorter[kind].append(statistics.mean(wholes[-2:]) - less)
    taken = {kind: statistics.median(times) for kind, times in shorter.items()}
    whole = statistics.median(wholes)
    rows: dict[str, dict[str, float]] = {WHOLE: {"ms": whole, "read_gbs": read_bandwidth("cuda")}}
    for kind in chain.kinds:
        rows[kind] = {"ms": taken[kind]}
        if kind != "head":
            rows[kind]["us_a_block"] = taken[kind] / backend.setup.architecture.layers * 1e3
        if gb := chain.bytes_of(kind, context) / 1e9:
            rows[kind] |= {"gb": gb, "gbs": gb / taken[kind] * 1e3}
    rows[REST] = {"ms": whole - sum(taken[kind] for kind in chain.kinds)}
    rows[SERIAL] = {"ms": whole - taken[SERIAL]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the answer goes as JSON")
    args = parser.parse_args()
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    cell = planned(args)
    os.environ |= kernel_environment(cell.config.cache, cell.versions) | dict(os.environ)
    request = Request(cell.config, cell.device.kind, cell.targets)
    with torch.inference_mode(), alone_on(cell.device, WAIT, partial(print, file=sys.stderr)):
        build(request)
        with factory(request) as make:
            backend = make(None)
            backend.load(args.context + ROOM)
            backend._cache.normal_()
            backend.seek(args.context)
            rows = account(backend, args.context)
    for kind, row in rows.items():
        print(kind, {key: round(value, 4) for key, value in row.items()})
    if args.out:
        asked = {"model": args.model, "quant": args.quant, "context": args.context, "batch": args.batch}
        args.out.write_text(json.dumps({"kinds": rows} | asked | provenance(cell.device), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the harness costs the user: pairs of rfloor's eager median and a bare loop's, interleaved in one process.

    python bench/harness_cost.py [--pairs 10] [--windows 5] [--model qwen2.5-7b] [--context 2048] [--cache static]
                                 [--out FILE]

Both arms decode the same architecture in plain transformers on this machine's device: one through rfloor's own
`measure`, one by `bare_loop.decode`. They share the process because two processes of one host may differ by half,
which is no part of either. A pair is the median of several windows of each arm, taken in turns with the order
alternating: a host that slows down for a second spoils a window and not the pair. The static cache is the default
because its shapes do not change: with a growing one PyTorch may plan its attention kernel anew at every length.
Prints every pair, the geometric mean of rfloor / bare, and Student's t interval on the log ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bare_loop
import torch
from scipy import stats

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.hf import HfBackend
from backends.quant.none import NoQuant
from registry.api import Architecture, NoOptions, Setup
from registry.compose import Composer
from registry.measure import measure, synchronise
from registry.plugins import Catalog
from registry.weights import RandomWeights

if TYPE_CHECKING:
    from registry.schema import ExecutionConfig, ProtocolConfig


class Arms:
    """Both ways to the same figure."""

    def __init__(self, model: str, context: int, cache: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = Composer(Catalog()).cell([f"model={model}", f"context={context}", "protocol=paper"])
        self.protocol: ProtocolConfig = config.protocol
        self.execution: ExecutionConfig = config.execution
        self.cache = cache
        architecture = Architecture.of(config.model)
        attention = Sdpa(SdpaOptions())
        self.backend = HfBackend(
            Setup(
                architecture,
                RandomWeights(0),
                self.device,
                torch.bfloat16,
                1,
                cache,
                NoQuant(NoOptions()),
                attention,
                NoOptions(),
            )
        )
        self.backend.load(context + self.protocol.warmup_steps + self.protocol.measured_steps)
        self.model = bare_loop.make_model(architecture.transformers_config(), self.device)

    def rfloor(self) -> float:
        measured = measure(self.backend, self.execution, self.protocol, float(self.protocol.context), lambda _: None)
        return statistics.median(measured["step_times_ms"])

    def bare(self) -> float:
        times = bare_loop.decode(self.model, self.protocol.context, self.cache, self.device)
        return statistics.median(times)


def pair(arms: Arms, windows: int) -> dict[str, Any]:
    """One pair: each arm's windows, their medians, and the ratio of those."""
    taken: dict[str, list[float]] = {"rfloor": [], "bare": []}
    for window in range(windows):
        for arm in (arms.bare, arms.rfloor) if window % 2 == 0 else (arms.rfloor, arms.bare):
            taken[arm.__name__].append(arm())
            synchronise(arms.device)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {**medians, "ratio": medians["rfloor"] / medians["bare"], "windows": taken}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pairs = []
    with torch.inference_mode():
        arms = Arms(args.model, args.context, args.cache)
        arms.rfloor(), arms.bare()  # both have met every shape before the first pair
        for _ in range(args.pairs):
            pairs.append(pair(arms, args.windows))
            print(json.dumps(pairs[-1]), flush=True)
    logs = [math.log(each["ratio"]) for each in pairs]
    mean, error = sum(logs) / len(logs), stats.sem(logs)
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=mean, scale=error)
    result = {"pairs": pairs, "ratio": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}
    print(f"rfloor / bare = {result['ratio']:.4f}, 95 % interval [{result['low']:.4f}, {result['high']:.4f}]")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

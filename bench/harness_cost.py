"""What the harness costs the user: pairs of rfloor's eager median and a bare loop's, alternating.

    python bench/harness_cost.py [--pairs 6] [--model qwen2.5-7b] [--context 2048] [--cache static] [--out FILE]

The static cache is the default because its shapes do not change: with a growing cache PyTorch may plan its
attention kernel anew at every length, which is no part of either loop and far noisier than both.

Each arm is a fresh process; the order within a pair alternates. Prints every pair, the geometric mean of
rfloor / bare, and Student's t interval on the log ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).parent.parent


def bare(model: str, context: int, cache: str) -> float:
    command = [sys.executable, "bench/bare_loop.py", "--model", model, "--context", str(context)]
    command += ["--cache", cache]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out.splitlines()[-1])["median_ms"])


def rfloor(model: str, context: int, cache: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"model={model}",
            f"context={context}",
            f"execution.cache={cache}",
            f"records={folder}/records",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"tracking.artifacts={folder}/artifacts",
        ]
        command = [sys.executable, "runner.py", *overrides]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (record,) = Path(folder, "records").rglob("*.json")
        return float(json.loads(record.read_text())["metrics"]["median_tpot_ms"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pairs = []
    for index in range(args.pairs):
        arms = [bare, rfloor] if index % 2 == 0 else [rfloor, bare]
        pair = {arm.__name__: arm(args.model, args.context, args.cache) for arm in arms}
        pairs.append(pair | {"ratio": pair["rfloor"] / pair["bare"]})
        print(json.dumps(pairs[-1]), flush=True)
    logs = [math.log(pair["ratio"]) for pair in pairs]
    mean, error = sum(logs) / len(logs), stats.sem(logs)
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=mean, scale=error)
    result = {"pairs": pairs, "ratio": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}
    print(f"rfloor / bare = {result['ratio']:.4f}, 95 % interval [{result['low']:.4f}, {result['high']:.4f}]")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

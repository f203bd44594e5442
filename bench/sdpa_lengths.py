"""What PyTorch's attention pays for a key length that it has not seen, and whether it repeats itself. Needs CUDA.

    python bench/sdpa_lengths.py [--out FILE]

Imports nothing of rfloor. One query token, 28 query and 4 key/value heads of 128, bf16. For each kernel: the median
time of a call over lengths that are new to the process, the same once they are not, and at how many lengths
repeated calls on the same tensors gave different bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bare_loop import SDPA, pinned
from torch.nn.functional import scaled_dot_product_attention

KERNELS = ("default", *SDPA)
Q_HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
LENGTHS = 40
REPEATS = 6


def tensors(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one step, laid out as a model lays them out."""
    q = torch.randn(1, 1, Q_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 1, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return q, k, v


def timed(inputs: tuple[torch.Tensor, ...]) -> tuple[float, torch.Tensor]:
    """Milliseconds of one call, a synchronise around it, and its output."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    out = scaled_dot_product_attention(*inputs, enable_gqa=True)
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e6, out


def study(kernel: str, first: int) -> dict[str, Any]:
    """One kernel over `LENGTHS` lengths from `first` on, `REPEATS` rounds of each."""
    with pinned(kernel):
        timed(tensors(first - 1))  # what is paid once a process
        new, seen, differ = [], [], 0
        for length in range(first, first + LENGTHS):
            inputs = tensors(length)
            calls = [timed(inputs) for _ in range(REPEATS)]
            new.append(calls[0][0])
            seen.append(statistics.median(ms for ms, _ in calls[1:]))
            differ += any(not torch.equal(calls[0][1], out) for _, out in calls[1:])
    return {"new_ms": statistics.median(new), "seen_ms": statistics.median(seen), "lengths_that_differ": differ}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    # Lengths of its own for each kernel: cuDNN's plans serve `default` too.
    found = {kernel: study(kernel, 2049 + 100 * place) for place, kernel in enumerate(KERNELS)}
    for name, figures in found.items():
        print(f"{name}: {json.dumps(figures)}")
    if args.out:
        told = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lengths": LENGTHS}
        args.out.write_text(json.dumps(told | {"kernels": found}, indent=1))


if __name__ == "__main__":
    main()

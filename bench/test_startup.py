"""What a user waits for before anything is measured. `make bench`; on two cores --help stays under 1.5 s and
the dry run of 48 cells under 5 s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

RUNNER = Path(__file__).parent.parent / "runner.py"
CALLS = {
    "help": ["--help"],
    "bad input": ["quant=nf5"],
    "dry run of 48 cells": [
        "-m",
        "dry_run=true",
        "model=qwen2.5-7b,mistral-7b-v0.3,llama-3.1-8b",
        "context=2048,4096,8192,16384",
        "execution=eager,cuda_graph",
        "quant=none,nf4",
    ],
}


@pytest.mark.parametrize("call", CALLS)
def test_startup(benchmark: BenchmarkFixture, call: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RUNNER), *CALLS[call]]

    def run() -> int:
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    code = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    assert code == (2 if call == "bad input" else 0)

"""What goes wrong on a GPU, done for real on one: its memory used up, its context broken, others on it.

Looks at records alone, so that it runs where MLflow is not installed.
"""

import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sweeps import Start, Sweep

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ON_GPU = ("gpu=auto", "model=tiny", "context=64", "protocol.warmup_steps=1", "protocol.measured_steps=5")
COMPUTES = """
import torch
held = torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
a @ a
torch.cuda.synchronize()
print("ready", flush=True)
while True:
    for _ in range(100):
        a @ a
    torch.cuda.synchronize()
"""


@pytest.fixture
def computing() -> Iterator[subprocess.Popen[str]]:
    """Somebody else, who has 3 GiB of the device and keeps it busy."""
    with subprocess.Popen([sys.executable, "-c", COMPUTES], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        yield other
        other.kill()


def outcomes(sweep: Sweep) -> list[str]:
    return [record["outcome"] for record in sweep.records()]


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("exhausts", "oom", "out of memory"),
        ("fills-device", "oom", "out of memory"),
        ("breaks-context", "crash", "CUDA error|device-side assert"),
    ],
)
def test_the_next_cell_gets_a_fresh_context(start: Start, fault: str, outcome: str, reason: str) -> None:
    sweep = start(f"backend=hf,{fault},hf", *ON_GPU, "protocol.seed=1", "execution=eager").end()
    found = {record["config"]["backend"]["name"]: record for record in sweep.records()}
    assert found[fault]["outcome"] == outcome, found[fault]["reason"]
    assert any(words in found[fault]["reason"] for words in reason.split("|")), found[fault]["reason"]
    assert outcomes(sweep).count("ok") == 2, sweep.stderr
    assert sweep.left_processes == []


def test_a_quiet_device_gives_no_warning(start: Start) -> None:
    """Neither the driver's own memory nor the worker before counts as somebody else."""
    sweep = start(*ON_GPU, "protocol.seed=1,2,3").end()
    assert outcomes(sweep) == ["ok"] * 3, sweep.stderr
    for record in sweep.records():
        assert not shared(record), record["measured"]["load_before"]
        assert record["measured"]["load_before"]


def test_who_else_computes_is_recorded_and_told(start: Start, computing: subprocess.Popen[str]) -> None:
    sweep = start(*ON_GPU).end()
    [record] = sweep.records()
    before = record["measured"]["load_before"]
    assert record["outcome"] == "ok", record["reason"]
    assert before["memory_used_bytes"] > 3 << 30 or before["processes"]
    assert before["utilisation_percent"] > 50
    assert len(shared(record)) == 2, record["warnings"]
    assert "shared: " in sweep.stdout


def shared(record: dict[str, Any]) -> list[str]:
    return [warning for warning in record["warnings"] if warning.startswith("shared: ")]


def test_a_second_sweep_waits_for_the_device(start: Start) -> None:
    """By the device's own UUID: no two cells are measured at the same time."""
    first = start(*ON_GPU, "protocol.seed=1,2")
    second = start(*ON_GPU, "protocol.seed=3,4", "on_busy=wait")
    windows = []
    for sweep in (first, second):
        assert outcomes(sweep.end()) == ["ok", "ok"], sweep.stderr
        for record in sweep.records():
            assert not shared(record), record["warnings"]
            ended = datetime.fromisoformat(record["started_at"]) + timedelta(seconds=record["wall_s"])
            windows.append((ended - timedelta(seconds=sum(record["measured"]["stages_s"].values())), ended))
    windows.sort()
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(windows)), windows


def test_a_second_sweep_may_refuse_to_wait(start: Start) -> None:
    first = start(*ON_GPU, "backend=waits")
    first.until_it_hangs()
    second = start(*ON_GPU, "on_busy=refuse").end()
    [record] = second.records()
    assert record["outcome"] == "interrupted"
    assert f"by process {first.process.pid} " in record["reason"]
    (first.folder / "go").touch()
    assert outcomes(first.end()) == ["ok"], first.stderr

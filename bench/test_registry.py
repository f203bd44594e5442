"""What rfloor's own parts cost: planning a cell, writing a record, logging a run, and looking at many records.

`make bench`; on two idle cores 1000 records are to be imported in under 60 s, and `rfloor status` to tell of 10,000
in under 2 s.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from registry import record as records
from registry.compose import Composer
from registry.hardware import find_device
from registry.importing import import_records
from registry.manifest import KIND, Manifest, Planned
from registry.outcome import Outcome
from registry.plan import Planner
from registry.plugins import Catalog
from registry.schema import TrackingConfig
from registry.shown import artifacts
from registry.tracking import Tracker

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

COUNTER = itertools.count()
MEASURED = Path(__file__).parent.parent / "docs/results/2026-11-22-h200/records/11be46667450d89a"
"""A cell that was measured: 30 step times, and all that stands beside them."""
A_SWEEP = 500
LOG_LINES = 100


def made_up_record() -> records.Record:
    return records.Record(
        record_id=f"record-{next(COUNTER)}",
        cell_id="cell",
        sweep_id="sweep",
        index=next(COUNTER),
        outcome=Outcome.OK,
        label="made up",
        started_at="2026-01-01T00:00:00+00:00",
        wall_s=1.0,
        config={"model": {"name": "tiny"}, "protocol": {f"key{i}": i for i in range(60)}},
        environment={"device": {"name": "none"}},
        step_times_ms=[1.0 + i / 100 for i in range(30)],
        metrics={f"metric{i}": float(i) for i in range(20)},
    )


def test_plan_a_cell(benchmark: BenchmarkFixture) -> None:
    composer = Composer(Catalog())
    planner = Planner(Catalog(), composer.profiles(), find_device())
    benchmark(lambda: planner.plan(composer.cell(["model=tiny", "gpu=cpu", "context=64"])))


def test_write_a_record(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    benchmark(lambda: records.write(made_up_record(), tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_log_a_run(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    config = TrackingConfig("bench", f"sqlite:///{tmp_path}/mlflow.db", "bench", str(tmp_path / "artifacts"))
    tracker = Tracker(config)

    def log() -> None:
        record = made_up_record()
        file = records.write(record, tmp_path)
        tracker.close(tracker.open(record.record_id, record.label, record.config, {}), record, artifacts(file))

    benchmark.pedantic(log, rounds=20, warmup_rounds=2)


def fill(folder: Path, number: int) -> None:
    """Write so many records, as real ones are, with the manifests of their sweeps."""
    file = min(MEASURED.glob("*.json"))
    measured = records.read(file)
    for first in range(0, number, A_SWEEP):
        sweep_id = f"20260701-{first:06}-abcd"
        own = [
            dataclasses.replace(
                measured, record_id=f"{place:032x}", cell_id=f"{place:016x}", sweep_id=sweep_id, index=place - first
            )
            for place in range(first, min(first + A_SWEEP, number))
        ]
        jobs = [Planned(one.index, one.cell_id, one.session, one.experiment, one.label) for one in own]
        plain = {"schema_version": 1, "kind": KIND, **dataclasses.asdict(Manifest(sweep_id, own[0].started_at, jobs))}
        contents = {records.path(folder, one.cell_id, sweep_id, one.index): one.plain() for one in own}
        for place, content in {**contents, folder / "sweeps" / f"{sweep_id}.json": plain}.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(content, indent=1) + "\n")  # as `write_json`, which waits for the disk
        for place in contents:
            place.with_suffix(".log").write_text("a line that a worker has printed\n" * LOG_LINES)


@pytest.mark.filterwarnings("ignore")
def test_import_1000_records(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    fill(tmp_path / "records", 1000)
    config = TrackingConfig("bench", f"sqlite:///{tmp_path}/mlflow.db", "bench", str(tmp_path / "artifacts"))
    Tracker(config)  # makes the tables, which takes seconds
    counts, problems = benchmark.pedantic(lambda: import_records(tmp_path / "records", config), rounds=1)
    assert (counts["imported"], problems) == (1000, [])


def test_tell_the_status_of_10000_records(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    fill(tmp_path, 10_000)
    command = [sys.executable, "-P", "-m", "registry.cli", "status", str(tmp_path)]

    def tell() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    told = benchmark.pedantic(tell, rounds=3, warmup_rounds=1)
    assert told.count("ended") == 10_000 // A_SWEEP

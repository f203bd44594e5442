"""What rfloor's own parts cost: planning a cell, writing a record, logging a run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from registry import record as records
from registry.compose import Composer
from registry.hardware import find_device
from registry.outcome import Outcome
from registry.plan import Planner
from registry.plugins import Catalog
from registry.schema import TrackingConfig
from registry.shown import artifacts
from registry.tracking import Tracker

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

COUNTER = itertools.count()


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
    profiles = {config.gpu.name: config.gpu for config in composer.profiles()}
    planner = Planner(Catalog(), profiles, find_device())
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

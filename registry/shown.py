"""What MLflow is given of a record: parameters, tags, artifacts, and the columns in which its UI shows them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from registry import record as records
from registry.kernels import short
from registry.outcome import Outcome, Refusal
from registry.registration import HASH_TAG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from registry.record import Record

STATUS = {
    Outcome.OK: "FINISHED",
    Outcome.OOM: "FINISHED",
    Outcome.UNSUPPORTED: "FINISHED",
    Outcome.INTERRUPTED: "KILLED",
}
"""MLflow's run status for an outcome; every other one is FAILED."""
PARAM_LIMIT = 6000  # characters of one parameter that MLflow's databases hold
TAG_LIMIT = 8000
NAME_LIMIT = 250
RECORD = "cell.json"
"""The artifact of a cell's run that is its record."""
TRACE = "trace.json.gz"
"""The artifact that is the trace of its profiled steps, where there are some."""
CONFIG = "config.yaml"
"""The artifact that is its configuration."""
REGISTRATION = "registration.json"
"""The artifact of an experiment's run that holds what was fixed beforehand."""
VIEW = "rfloor"
"""Key and name of the saved view that an experiment of ours has in MLflow's UI: the axes beside the figures,
where the UI alone would show neither."""
VIEW_COLUMNS = {
    "params.quant.name": 90,
    "params.attention.name": 110,
    "params.execution.name": 110,
    "metrics.median_tpot_ms": 120,
    "metrics.r_floor": 80,
    "metrics.mbu": 80,
    "metrics.mbu_attainable": 120,
    "metrics.tokens_per_s": 110,
    "metrics.floor_ms": 80,
    "metrics.peak_memory_gb": 130,
    "tags.outcome": 100,
    "tags.experiment": 110,
    "tags.kernels": 260,
    "params.protocol.context": 120,
    "params.backend.name": 100,
    "params.model.name": 110,
    "params.gpu.name": 90,
}
"""Columns of the view in order, and their widths in pixels; a run's name begins with its quant and execution."""


def tags(record: Record) -> dict[str, str]:
    """A run's tags: outcome, identity, device, commit, versions."""
    environment = record.environment
    device, git = environment.get("device", {}), environment.get("git", {})
    found = {
        "outcome": record.outcome.value,
        "reason": record.reason,
        "remedy": record.remedy,
        "warnings": "; ".join(record.warnings),
        "mlflow.note.content": _description(record),
        "cell_id": record.cell_id,
        "sweep_id": record.sweep_id,
        "experiment": record.experiment,
        "session": record.session or ("0" if record.experiment else ""),
        HASH_TAG: record.registration,
        "gpu_name": device.get("name", ""),
        "driver": device.get("driver", ""),
        "git_commit": git.get("commit", ""),
        "git_dirty": git.get("dirty", ""),
        "kernels": ", ".join(f"{name} x{n}" for name, n in short(record.measured.get("kernels", {})).items()),
        **environment.get("tags", {}),
        **{f"version.{name}": version for name, version in environment.get("versions", {}).items()},
    }
    return {key: str(value)[:TAG_LIMIT] for key, value in found.items() if value}


def _description(record: Record) -> str:
    """What the UI shows as a run's description: why it was not measured, or what weakens it."""
    why = [f"**{record.outcome.value}**: {Refusal(record.outcome, record.reason, record.remedy)}"]
    return "\n".join([*(why if record.reason else []), *(f"- {warning}" for warning in record.warnings)])


def saved_view() -> dict[str, str]:
    """The tag that MLflow's UI would write if somebody chose the columns and saved them as a view."""
    widths = {f"{column.replace('.', '.`', 1)}`": width for column, width in VIEW_COLUMNS.items()}
    state = {
        "selectedColumns": [*widths],
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *widths],
        "columnWidths": widths,
    }
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {f"mlflow.sharedViewState.{VIEW}": json.dumps(view)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested configuration as dotted names and text; empty ones are left out."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            yield prefix + key, str(value)


def artifacts(file: Path) -> dict[str, Path]:
    """What a run keeps beside its figures, given where its record lies."""
    return {RECORD: file, "worker.log": file.with_suffix(".log"), TRACE: records.trace_path(file)}

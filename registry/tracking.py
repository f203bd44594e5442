"""Records to MLflow: the only place that knows MLflow.

A run is opened before its cell is measured and gets its results once the record is on disk, so that what
MLflow shows can always be rebuilt from the records by `rfloor import`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import record as records
from registry.outcome import Outcome
from registry.validate import SERVERS, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from registry.record import Record
    from registry.schema import TrackingConfig

RECORD_TAG = "rfloor.record_id"
STATUS = {
    Outcome.OK: "FINISHED",
    Outcome.OOM: "FINISHED",
    Outcome.UNSUPPORTED: "FINISHED",
    Outcome.INTERRUPTED: "KILLED",
}
"""MLflow's run status for an outcome; every other one is FAILED."""
PARAM_LIMIT = 6000  # characters of one parameter that MLflow's databases hold
QUIET_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no background thread beside a timed child
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is down is told in seconds, not in minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class TrackingDown(Exception):
    """MLflow could not be reached or did not take a run; the record is safe on disk."""


class Tracker:
    """Logs to one MLflow experiment.

    Args:
        config: Where it is.

    Raises:
        TrackingDown: MLflow cannot be reached.
    """

    def __init__(self, config: TrackingConfig) -> None:
        for name, value in QUIET_CLIENT.items():
            os.environ.setdefault(name, value)
        import logging

        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self.uri = config.uri
        self._client = _guard(MlflowClient, config.uri)
        self._experiment = _guard(self._find_experiment, config)

    def _find_experiment(self, config: TrackingConfig) -> str:
        found = self._client.get_experiment_by_name(config.experiment)
        if found is not None:
            return str(found.experiment_id)
        local = config.artifacts and not config.uri.startswith(SERVERS)
        location = Path(config.artifacts or "").absolute().as_uri() if local else None
        return str(self._client.create_experiment(config.experiment, artifact_location=location))

    def open(self, record_id: str, label: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Start a run.

        Args:
            record_id: Of the record that will follow.
            label: The run's name.
            config: The resolved configuration: its leaves are the run's parameters.
            tags: What is known beforehand.

        Returns:
            The run's id.

        Raises:
            TrackingDown: See the class.
        """
        from mlflow.entities import Param

        run = _guard(
            self._client.create_run,
            self._experiment,
            run_name=label,
            tags={RECORD_TAG: record_id, **tags},
        )
        params = [Param(key, value[:PARAM_LIMIT]) for key, value in flatten(config)]
        _guard(self._client.log_batch, run.info.run_id, params=params)
        return str(run.info.run_id)

    def close(self, run_id: str, record: Record, files: Mapping[str, Path]) -> None:
        """Log a record's results into its run and end it.

        Args:
            run_id: Of `open`.
            record: What came of the cell.
            files: Artifacts: the name to give each, and where it lies.

        Raises:
            TrackingDown: See the class.
        """
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, 0) for name, value in record.metrics.items()]
        metrics += [Metric("step_time_ms", float(t), now, i) for i, t in enumerate(record.step_times_ms)]
        _guard(
            self._client.log_batch,
            run_id,
            metrics=metrics,
            tags=[RunTag(key, value) for key, value in tags(record).items()],
        )
        for name, file in files.items():
            if file.exists():
                _guard(self._log_artifact, run_id, name, file)
        _guard(self._client.log_dict, run_id, record.config, "config.yaml")
        _guard(self._client.set_terminated, run_id, status=STATUS.get(record.outcome, "FAILED"))

    def _log_artifact(self, run_id: str, name: str, file: Path) -> None:
        self._client.log_text(run_id, file.read_text(encoding="utf-8", errors="replace"), name)

    def known(self) -> dict[str, tuple[str, bool]]:
        """Every run of the experiment by its record: run id, and whether it is complete."""
        return {
            run.data.tags[RECORD_TAG]: (
                run.info.run_id,
                "outcome" in run.data.tags and run.info.status != "RUNNING",
            )
            for run in self._runs()
            if RECORD_TAG in run.data.tags
        }

    def _runs(self) -> Iterator[Any]:
        token = None
        while True:
            page = _guard(self._client.search_runs, [self._experiment], max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def tags(record: Record) -> dict[str, str]:
    """A run's tags: outcome, identity, device, commit, versions."""
    environment = record.environment
    device, git = environment.get("device", {}), environment.get("git", {})
    found = {
        "outcome": record.outcome.value,
        "reason": record.reason,
        "warnings": "; ".join(record.warnings),
        "cell_id": record.cell_id,
        "sweep_id": record.sweep_id,
        "gpu_name": device.get("name", ""),
        "driver": device.get("driver", ""),
        "git_commit": git.get("commit", ""),
        **{f"version.{name}": version for name, version in environment.get("versions", {}).items()},
    }
    return {key: str(value) for key, value in found.items() if value}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested configuration as dotted names and text; empty ones are left out."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            yield prefix + key, str(value)


def artifacts(file: Path) -> dict[str, Path]:
    """What a run keeps beside its figures, given where its record lies."""
    return {"cell.json": file, "worker.log": file.with_suffix(".log")}


def import_records(folder: Path, config: TrackingConfig) -> tuple[Counter[str], list[str]]:
    """Log every record under `folder` that MLflow does not have yet; complete the runs that were cut off.

    Args:
        folder: Searched with its subfolders.
        config: Where MLflow is.

    Returns:
        How many records were `imported`, `completed` and `present` already, and a line for each file that is
        no record.

    Raises:
        TrackingDown: MLflow cannot be reached.
    """
    tracker = Tracker(config)
    known = tracker.known()
    counts: Counter[str] = Counter()
    problems = []
    for file in sorted(folder.rglob("*.json")):
        try:
            record = records.read(file)
        except records.BadRecord as error:
            problems.append(str(error))
            continue
        run_id, complete = known.get(record.record_id, ("", False))
        if complete:
            counts["present"] += 1
            continue
        counts["completed" if run_id else "imported"] += 1
        if not run_id:
            run_id = tracker.open(record.record_id, record.label, record.config, tags(record))
        tracker.close(run_id, record, artifacts(file))
        known[record.record_id] = (run_id, True)
    return counts, problems


def _guard(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call MLflow; whatever it raises becomes `TrackingDown` with the first line of the cause."""
    try:
        return call(*arguments, **keywords)
    except Exception as error:
        first = redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise TrackingDown(first) from error

"""Records to MLflow: the only place that knows MLflow.

A run is opened before its cell is measured and gets its results once the record is on disk, so that what
MLflow shows can always be rebuilt from the records by `rfloor import`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from registry import logs
from registry import record as records
from registry.archive import everything_in
from registry.kernels import short
from registry.outcome import Outcome, Refusal
from registry.record import Record
from registry.redact import Redactor, environment_secrets, known_secrets, redact
from registry.registration import KIND, Registration
from registry.validate import SERVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from registry.schema import TrackingConfig

T = TypeVar("T")
RECORD_TAG = "rfloor.record_id"
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
QUIET_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no background thread beside a timed child
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is down is told in seconds, not in minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
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

        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise TrackingDown(f"mlflow cannot be imported: {error}") from error

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # what fails is raised, and told once
        self.uri = config.uri
        self._secrets = environment_secrets(os.environ)
        self.keep_secret(known_secrets({"uri": config.uri}))
        self._client = _guard(MlflowClient, config.uri)
        self._experiment = _guard(self._find_experiment, config)

    def _find_experiment(self, config: TrackingConfig) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(config.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingDown(
                f"the experiment {config.experiment!r} is deleted: name another with tracking.experiment=... or "
                f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        if found is not None:
            return str(found.experiment_id)
        location = None
        if config.artifacts and not config.uri.startswith(SERVERS):
            folder = config.artifacts
            location = folder if "://" in folder else Path(folder).absolute().as_uri()
        try:
            created = self._client.create_experiment(config.experiment, location, tags=_saved_view())
        except MlflowException:  # another process was faster, or it is a real error that will come again
            found = self._client.get_experiment_by_name(config.experiment)
            if found is None:
                raise
            created = found.experiment_id
        return str(created)

    def keep_secret(self, known: set[str]) -> None:
        """Hide these, too, in what is logged from now on."""
        self._secrets |= known
        self._hidden = Redactor(self._secrets)

    @property
    def page(self) -> str:
        """Where the UI shows the experiment's runs with rfloor's columns; follows the server's address."""
        return f"/#/experiments/{self._experiment}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"

    def open(
        self,
        record_id: str,
        label: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        started_at: str | None = None,
    ) -> str:
        """Start a run.

        Args:
            record_id: Of the record that will follow.
            label: The run's name.
            config: The resolved configuration: its leaves are the run's parameters.
            tags: What is known beforehand.
            started_at: When its cell began, ISO 8601; now if it is not given.

        Returns:
            The run's id.

        Raises:
            TrackingDown: See the class.
        """
        run = _guard(
            self._client.create_run,
            self._experiment,
            start_time=_milliseconds(started_at) if started_at else None,
            run_name=self._hidden.text(label)[:NAME_LIMIT],
            tags={RECORD_TAG: record_id, **self._hidden.plain(tags)},
        )
        self.log_params(run.info.run_id, config)
        return str(run.info.run_id)

    def log_params(self, run_id: str, config: Mapping[str, Any]) -> None:
        """Log the leaves of a configuration; those that the run has already stay as they are.

        Raises:
            TrackingDown: See the class.
        """
        from mlflow.entities import Param

        leaves = dict(flatten(self._hidden.plain(config)))
        params = [
            Param(key, value[:PARAM_LIMIT])
            for key, value in leaves.items()
            # Of the parameters that differ the UI compares three unasked; a plugin under its own name is no news.
            if not (key.endswith(".plugin") and value == leaves.get(f"{key.removesuffix('plugin')}name"))
        ]
        _guard(self._client.log_batch, run_id, params=params)

    def open_experiment(self, registration: Registration, file: Path) -> str:
        """Start the run of an experiment, with what was registered of it; its cells have runs of their own.

        Args:
            registration: What was fixed beforehand.
            file: Where it lies.

        Returns:
            The run's id.

        Raises:
            TrackingDown: See the class.
        """
        name = f"experiment {registration.experiment.name}"
        run_id = self.open(registration.record_id, name, {}, registration.tags(), registration.registered_at)
        _guard(self._log_artifact, run_id, REGISTRATION, file)
        return run_id

    def close_experiment(self, run_id: str, verdicts: Sequence[str], files: Sequence[Path]) -> None:
        """Log an experiment's verdicts and report, and end its run.

        Raises:
            TrackingDown: See the class.
        """
        if verdicts:
            told = self._hidden.text("\n".join(verdicts))
            _guard(self._client.set_tag, run_id, "verdict", told[:TAG_LIMIT])
        for file in files:
            _guard(self._log_artifact, run_id, file.name, file)
        _guard(self._client.set_terminated, run_id, status="FINISHED")

    def close(self, run_id: str, record: Record, files: Mapping[str, Path]) -> None:
        """Log a record's results into its run and end it.

        Everything logged is dated by the record, so that logging it again adds nothing.

        Args:
            run_id: Of `open`.
            record: What came of the cell.
            files: Artifacts: the name to give each, and where it lies.

        Raises:
            TrackingDown: See the class.
        """
        from mlflow.entities import Metric, RunTag

        record = Record(**self._hidden.plain(vars(record)))
        end = _milliseconds(record.started_at) + round(record.wall_s * 1000)
        metrics = [Metric(name, float(value), end, 0) for name, value in record.metrics.items()]
        for name, times in (("step_time_ms", record.step_times_ms), ("call_time_us", record.call_times_us)):
            metrics += [Metric(name, float(time), end, place) for place, time in enumerate(times)]
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
        status = STATUS.get(record.outcome, "FAILED")
        _guard(self._client.set_terminated, run_id, status=status, end_time=end)

    def _log_artifact(self, run_id: str, name: str, file: Path) -> None:
        """Log a file under another name, byte by byte and however large, but for secrets that others left in it."""
        with tempfile.TemporaryDirectory(prefix="rfloor-") as folder:
            place = Path(folder, name)
            content = records.read_json(file) if file.suffix == ".json" else None
            if file.suffix == ".log":
                logs.clean(file, place, self._hidden)
            elif (kept := self._hidden.plain(content)) != content:
                records.write_json(place, kept)
            else:
                place.symlink_to(file.absolute())
            self._client.log_artifact(run_id, str(place))

    def known(self) -> dict[str, tuple[str, bool]]:
        """Every run of the experiment by its record: run id, and whether it is complete."""
        return {
            run.data.tags[RECORD_TAG]: (
                run.info.run_id,
                run.info.status != "RUNNING" and ("outcome" in run.data.tags or run.data.tags.get("kind") == KIND),
            )
            for run in self._runs()
            if RECORD_TAG in run.data.tags
        }

    def recorded(
        self, name: str, read: Callable[[Any], T], experiment: str = "", sweeps: Collection[str] = ()
    ) -> tuple[list[tuple[str, T]], list[str]]:
        """What runs keep under `name`, with each run's id; and each run whose artifact says nothing, with the reason.

        Args:
            name: Of the artifact, `RECORD` or `REGISTRATION`; runs of the other kind are passed over.
            read: Makes something of the artifact's JSON, or raises BadRecord.
            experiment: Only runs of this experiment of ours; empty for all.
            sweeps: Only runs of these sweeps; empty for all.

        Raises:
            TrackingDown: See the class.
        """
        found, problems = [], []
        with tempfile.TemporaryDirectory(prefix="rfloor-") as folder:
            for run in self._runs(f"tags.experiment = '{experiment}'" if experiment else ""):
                tags = run.data.tags
                if (tags.get("kind") == KIND) != (name == REGISTRATION) or run.info.status == "RUNNING":
                    continue
                if sweeps and tags.get("sweep_id") not in sweeps:
                    continue
                run_id = run.info.run_id
                try:
                    found.append((run_id, read(records.read_json(self._artifact(run_id, name, folder)))))
                except records.BadRecord as error:
                    problems.append(f"run {run_id}, {name}: {error}")
        return found, problems

    def _artifact(self, run_id: str, name: str, folder: str) -> Path:
        """Bring a run's artifact here.

        Raises:
            TrackingDown: See the class.
            BadRecord: MLflow answers, and the run has none.
        """
        try:
            return Path(_guard(self._client.download_artifacts, run_id, name, folder))
        except TrackingDown:
            if name not in {artifact.path for artifact in _guard(self._client.list_artifacts, run_id)}:
                raise records.BadRecord("the run has no such artifact") from None
            raise

    def _runs(self, where: str = "") -> Iterator[Any]:
        token = None
        while True:
            page = _guard(
                self._client.search_runs, [self._experiment], filter_string=where, max_results=1000, page_token=token
            )
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
        "remedy": record.remedy,
        "warnings": "; ".join(record.warnings),
        "mlflow.note.content": _description(record),
        "cell_id": record.cell_id,
        "sweep_id": record.sweep_id,
        "experiment": record.experiment,
        "session": record.session or ("0" if record.experiment else ""),
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


def _saved_view() -> dict[str, str]:
    """The tag that MLflow's UI would write if somebody chose the columns and saved them as a view."""
    widths = {f"{column.replace('.', '.`', 1)}`": width for column, width in VIEW_COLUMNS.items()}
    state = {
        "selectedColumns": [*widths],
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *widths],
        "columnWidths": widths,
    }
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {f"mlflow.sharedViewState.{VIEW}": json.dumps(view)}


def _milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested configuration as dotted names and text; empty ones are left out."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            yield prefix + key, str(value)


def artifacts(file: Path) -> dict[str, Path]:
    """What a run keeps beside its figures, given where its record lies."""
    return {RECORD: file, "worker.log": file.with_suffix(".log"), "trace.json.gz": records.trace_path(file)}


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
    logs.finish_abandoned(folder)
    everything, problems = everything_in(folder)
    for file, found in everything:
        run_id, complete = known.get(found.record_id, ("", False))
        if complete:
            counts["present"] += 1
            continue
        counts["completed" if run_id else "imported"] += 1
        run_id = _import(tracker, found, run_id, file)
        known[found.record_id] = (run_id, True)
    return counts, problems


def _import(tracker: Tracker, found: Record | Registration, run_id: str, file: Path) -> str:
    """Log what MLflow lacks of a record or a registration; its run's id."""
    if isinstance(found, Registration):
        run_id = run_id or tracker.open_experiment(found, file)
        tracker.close_experiment(run_id, (), ())
        return run_id
    tracker.keep_secret(known_secrets(found.config))
    if run_id:
        tracker.log_params(run_id, found.config)
    else:
        run_id = tracker.open(found.record_id, found.label, found.config, tags(found), found.started_at)
    tracker.close(run_id, found, artifacts(file))
    return run_id


def _guard(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call MLflow; whatever it raises becomes `TrackingDown` with the first line of the cause."""
    try:
        return call(*arguments, **keywords)
    except Exception as error:
        first = redact(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise TrackingDown(first) from error

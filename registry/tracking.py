"""Records to MLflow: the only place that knows MLflow.

A run is opened before its cell is measured and gets its results once the record is on disk, so that what
MLflow shows can always be rebuilt from the records by `rfloor import`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from registry import record as records
from registry.archive import everything_in
from registry.kernels import short
from registry.locks import locked
from registry.outcome import BadInput, Outcome, Refusal, nearest
from registry.patience import persist
from registry.process import has_ended, this_process
from registry.registration import HASH_TAG, KIND, Registration
from registry.validate import SERVERS, redact, sqlite_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from registry.record import Record
    from registry.schema import TrackingConfig

T = TypeVar("T")
RECORD_TAG = "rfloor.record_id"
PROCESS_TAG = "rfloor.process"
"""The process that opened a run and is to close it."""
LEFT = "the process that measured this was killed; if its record lies on disk, rfloor import completes the run"
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
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # rfloor asks again itself: see `Tracker._create_run`
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds; a server that hangs is told within them, not within minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # of every run that ends on a server
    "PGCONNECT_TIMEOUT": "10",  # seconds, libpq's own, for a PostgreSQL that is reached without a server
}
PATIENCE_S = 12.0
"""How long one call of MLflow may fail before it is left alone. The attempt that is under way then may last longer: a
request its 15 s, and where somebody keeps an SQLite database locked MLflow itself waits for 20."""
OPENING_S = 60.0
"""How long others may be at opening the same SQLite database; the first makes its tables, which takes seconds."""
PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""MLflow's codes for what may be gone a little later; it gives the first to a server that does not answer, too."""


class TrackingDown(Exception):
    """MLflow could not be reached or did not take a run; the record is safe on disk."""


class Tracker:
    """Logs to one MLflow experiment.

    Args:
        config: Where it is.
        reading: Only look: nothing is created where there is none.

    Raises:
        TrackingDown: MLflow cannot be reached.
        BadInput: There is nothing to look at.
    """

    def __init__(self, config: TrackingConfig, reading: bool = False) -> None:
        if reading and (file := _missing_database(config.uri)):
            raise BadInput(
                f"tracking.uri={redact(config.uri)}: there is no {file}; nothing was measured or imported there"
            )
        for name, value in QUIET_CLIENT.items():
            os.environ.setdefault(name, value)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # not even where somebody wants more of them
        import logging

        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise TrackingDown(f"mlflow cannot be imported: {error}") from error

        logging.getLogger("alembic").setLevel(logging.WARNING)
        for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):  # what fails is raised, and told once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not config.uri.startswith(SERVERS):
            import mlflow.store.db.utils as databases

            databases.MAX_RETRY_COUNT = 1  # its ten attempts take 101 s, and no setting says otherwise
        self.uri = config.uri
        with _alone(config.uri):
            self._client = self._ask(MlflowClient, config.uri)
            found = self._ask(self._find_experiment, config, create=not reading)
        if found is None:
            known = [one.name for one in self._ask(self._client.search_experiments)]
            raise BadInput(
                f"MLflow has no experiment called {config.experiment!r}: {nearest(config.experiment, known)}"
            )
        self._experiment: str = found

    def _ask(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call MLflow, again while what it raises may pass; in the end that becomes `TrackingDown`, in one line."""
        start = time.monotonic()
        try:
            return persist(lambda: call(*arguments, **keywords), _may_pass, PATIENCE_S)
        except TrackingDown:
            raise
        except Exception as error:
            raise TrackingDown(_cause(error, self.uri, time.monotonic() - start)) from error

    def _find_experiment(self, config: TrackingConfig, create: bool) -> str | None:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(config.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingDown(
                f"the experiment {config.experiment!r} is deleted: name another with tracking.experiment=... or "
                f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        if found is not None:
            return str(found.experiment_id)
        if not create:
            return None
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
        start = _milliseconds(started_at) if started_at else None
        run_id = self._create_run(record_id, start_time=start, run_name=label[:NAME_LIMIT], tags=tags)
        self.log_params(run_id, config)
        return run_id

    def _create_run(self, record_id: str, tags: Mapping[str, str], **run: Any) -> str:
        """Make a record's run, and only one however often MLflow has to be asked.

        Of all calls this one alone adds something each time it is made, and may have done so although its answer was
        lost. Hence whoever asks again looks first, and MLflow's client, which does not, never asks again itself. What
        remains is a server that makes the run after it was looked at.
        """
        attempts = itertools.count()
        tags = {RECORD_TAG: record_id, PROCESS_TAG: this_process(), **tags}

        def create() -> str:
            if next(attempts):
                for made in self._client.search_runs([self._experiment], filter_string=_of(record_id)):
                    if made.data.tags.get(RECORD_TAG) == record_id:
                        return str(made.info.run_id)
            made = self._client.create_run(self._experiment, tags=tags, **run)
            return str(made.info.run_id)

        return str(self._ask(create))

    def log_params(self, run_id: str, config: Mapping[str, Any]) -> None:
        """Log the leaves of a configuration; those that the run has already stay as they are.

        Raises:
            TrackingDown: See the class.
        """
        from mlflow.entities import Param

        leaves = dict(flatten(config))
        params = [
            Param(key, value[:PARAM_LIMIT])
            for key, value in leaves.items()
            # Of the parameters that differ the UI compares three unasked; a plugin under its own name is no news.
            if not (key.endswith(".plugin") and value == leaves.get(f"{key.removesuffix('plugin')}name"))
        ]
        self._ask(self._client.log_batch, run_id, params=params)

    def open_experiment(self, registration: Registration) -> str:
        """Start the run of an experiment; its cells have runs of their own.

        Args:
            registration: What was fixed beforehand.

        Returns:
            The run's id.

        Raises:
            TrackingDown: See the class.
        """
        name = f"experiment {registration.experiment.name}"
        return self.open(registration.record_id, name, {}, registration.tags(), registration.registered_at)

    def log_registration(self, run_id: str, file: Path) -> None:
        """Log the file of what was registered to its experiment's run.

        Raises:
            TrackingDown: See the class.
        """
        self._ask(self._log_artifact, run_id, REGISTRATION, file)

    def tell_experiment(self, run_id: str, verdicts: Sequence[str], files: Sequence[Path], place: str = "") -> None:
        """Log an experiment's verdicts and report.

        Args:
            run_id: The experiment's own run.
            verdicts: Line by line.
            files: Of the report.
            place: Folder among the artifacts.

        Raises:
            TrackingDown: See the class.
        """
        if verdicts:
            self._ask(self._client.set_tag, run_id, "verdict", "\n".join(verdicts)[:TAG_LIMIT])
        for file in files:
            self._ask(self._log_artifact, run_id, file.name, file, place)

    def close_experiment(self, run_id: str, verdicts: Sequence[str], files: Sequence[Path]) -> None:
        """Log an experiment's verdicts and report, and end its run.

        Raises:
            TrackingDown: See the class.
        """
        self.tell_experiment(run_id, verdicts, files)
        self._ask(self._client.set_terminated, run_id, status="FINISHED")

    def complete_experiment(self, run_id: str, file: Path) -> bool:
        """Log a registration to its run where that is missing, and end the run; whether anything was missing.

        Raises:
            TrackingDown: See the class.
        """
        ended = self._ask(self._client.get_run, run_id).info.status != "RUNNING"
        there = {artifact.path for artifact in self._ask(self._client.list_artifacts, run_id)}
        if REGISTRATION not in there:
            self._ask(self._log_artifact, run_id, REGISTRATION, file)
        if not ended:
            self._ask(self._client.set_terminated, run_id, status="FINISHED")
        return not ended or REGISTRATION not in there

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

        end = _milliseconds(record.started_at) + round(record.wall_s * 1000)
        metrics = [Metric(name, float(value), end, 0) for name, value in record.metrics.items()]
        for name, times in (("step_time_ms", record.step_times_ms), ("call_time_us", record.call_times_us)):
            metrics += [Metric(name, float(time), end, place) for place, time in enumerate(times)]
        self._ask(
            self._client.log_batch,
            run_id,
            metrics=metrics,
            tags=[RunTag(key, value) for key, value in tags(record).items()],
        )
        for name, file in files.items():
            if file.exists():
                self._ask(self._log_artifact, run_id, name, file)
        self._ask(self._client.log_dict, run_id, record.config, "config.yaml")
        status = STATUS.get(record.outcome, "FAILED")
        self._ask(self._client.set_terminated, run_id, status=status, end_time=end)

    def _log_artifact(self, run_id: str, name: str, file: Path, place: str = "") -> None:
        """Log a file under another name, byte by byte and however large."""
        with tempfile.TemporaryDirectory(prefix="rfloor-") as folder:
            link = Path(folder, name)
            link.symlink_to(file.absolute())
            self._client.log_artifact(run_id, str(link), place or None)

    def close_left(self) -> int:
        """End the runs that killed processes left running, as KILLED, and return how many there were.

        They get no outcome: an import may still find their records.

        Raises:
            TrackingDown: See the class.
        """
        left = [
            run.info.run_id
            for run in self._runs("attributes.status = 'RUNNING'")
            if has_ended(run.data.tags.get(PROCESS_TAG, ""))
        ]
        for run_id in left:
            self._ask(self._client.set_tag, run_id, "reason", LEFT)
            self._ask(self._client.set_terminated, run_id, status="KILLED")
        return len(left)

    def known(self, record_id: str = "") -> dict[str, tuple[str, bool]]:
        """Runs of the experiment by their record: run id, and whether it is complete.

        Args:
            record_id: Of the record that is asked for; empty for all.

        Raises:
            TrackingDown: See the class.
        """
        found: dict[str, tuple[str, bool]] = {}
        for run in self._runs(_of(record_id) if record_id else ""):
            tags = run.data.tags
            complete = run.info.status != "RUNNING" and ("outcome" in tags or tags.get("kind") == KIND)
            if RECORD_TAG in tags and (complete or tags[RECORD_TAG] not in found):
                found[tags[RECORD_TAG]] = (run.info.run_id, complete)
        return found

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
                registrations = name == REGISTRATION  # which a run has from its beginning, and a record at its end
                if (tags.get("kind") == KIND) != registrations or (
                    run.info.status == "RUNNING" and not registrations
                ):
                    continue
                if sweeps and tags.get("sweep_id") not in sweeps:
                    continue
                run_id = run.info.run_id
                try:
                    one = read(records.read_json(self._artifact(run_id, name, folder)))
                    if isinstance(one, Registration) and one.sha256 != tags.get(HASH_TAG):
                        raise records.BadRecord("another registration than the one with which the run began")
                    found.append((run_id, one))
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
            return Path(self._client.download_artifacts(run_id, name, folder))
        except Exception:  # of many kinds, and of the same for what is not there and for what cannot be had now
            if name not in {artifact.path for artifact in self._ask(self._client.list_artifacts, run_id)}:
                raise records.BadRecord("the run has no such artifact") from None
        return Path(self._ask(self._client.download_artifacts, run_id, name, folder))

    def _runs(self, where: str = "") -> Iterator[Any]:
        token = None
        while True:
            page = self._ask(
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

    Two that import the same files at once share the work: a record is held while it is logged (how far that reaches
    says `registry.locks.held`), and whoever holds it looks for its run first. Two that import copies of it in
    the same moment, from two folders or two machines, may both make a run.

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
    everything, problems = everything_in(folder)
    known = tracker.known()
    counts: Counter[str] = Counter()
    for file, found in everything:
        own = known.get(found.record_id, ("", False))
        if own[1] and not isinstance(found, Registration):
            counts["present"] += 1
            continue
        with locked(file):
            run_id, complete = tracker.known(found.record_id).get(found.record_id, ("", False))
            if run_id and isinstance(found, Registration):
                complete = not tracker.complete_experiment(run_id, file)
            counts["present" if complete else "completed" if run_id else "imported"] += 1
            if not complete:
                run_id = _import(tracker, found, run_id, file)
        known[found.record_id] = (run_id, True)
    return counts, problems


def _import(tracker: Tracker, found: Record | Registration, run_id: str, file: Path) -> str:
    """Log what MLflow lacks of a record or a registration; its run's id."""
    if isinstance(found, Registration):
        run_id = run_id or tracker.open_experiment(found)
        tracker.complete_experiment(run_id, file)
        return run_id
    if run_id:
        tracker.log_params(run_id, found.config)
    else:
        run_id = tracker.open(found.record_id, found.label, found.config, tags(found), found.started_at)
    tracker.close(run_id, found, artifacts(file))
    return run_id


def _missing_database(uri: str) -> Path | None:
    """The SQLite file of a tracking URI that is not there, which MLflow would make."""
    file = sqlite_file(uri)
    return file if file and not file.exists() else None


def _of(record_id: str) -> str:
    """A filter for the runs of a record; for all, where its name has no place in one."""
    return f"tags.`{RECORD_TAG}` = '{record_id}'" if re.fullmatch(r"[\w.-]+", record_id) else ""


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Open an SQLite database while no other rfloor of this machine does.

    MLflow makes its tables without asking whether somebody is at it, and what two make at once may stay broken. The
    folder is held and not the file, whose locks are SQLite's own business. A server of MLflow's that makes the same
    tables at that moment is not kept out.

    Raises:
        TrackingDown: Others are at it all the time.
    """
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file.resolve().parent, OPENING_S))
        except TimeoutError as error:
            raise TrackingDown(f"others have been opening {file} for {OPENING_S:.0f} s") from error
        yield


def _may_pass(error: Exception) -> bool:
    """Whether MLflow may be only busy, locked or starting.

    What a database raises reaches us unwrapped while it is opened: it is down, or another process makes its tables.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, MlflowException):
        return error.error_code in PASSING
    return isinstance(error, DBAPIError)


def _cause(error: Exception, uri: str, seconds: float) -> str:
    """Why MLflow failed, in one line without secrets."""
    file = sqlite_file(uri)
    if file and "database is locked" in str(error):
        return f"another process has kept {file} locked for {seconds:.0f} s"
    return redact(str(error).splitlines()[0]) if str(error) else type(error).__name__

"""Records to MLflow: the only place that knows MLflow.

A run is opened before its cell is measured and gets its results once the record is on disk, so that what
MLflow shows can always be rebuilt from the records by `rfloor import`.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from registry import faults, logs, traces
from registry import record as records
from registry.mlflow_client import TrackingDown, forget, opened
from registry.outcome import BadInput, nearest
from registry.process import has_ended, this_process
from registry.record import Record
from registry.redact import Redactor, environment_secrets, known_secrets, redact
from registry.registration import HASH_TAG, KIND, LOGGED_TAG, Logged, Registration
from registry.shown import (
    CONFIG,
    NAME_LIMIT,
    PARAM_LIMIT,
    REGISTRATION,
    STATUS,
    TAG_LIMIT,
    VIEW,
    flatten,
    saved_view,
    tags,
)
from registry.validate import SERVERS, sqlite_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from mlflow.entities import Param

    from registry.schema import ExperimentConfig, TrackingConfig

T = TypeVar("T")
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # many times as fast where it is there
RECORD_TAG = "rfloor.record_id"
REPORT = "report"
"""The kind of a run that has nothing but a report over all runs."""
PROCESS_TAG = "rfloor.process"
"""The process that opened a run and is to close it."""
LEFT = "the process that measured this was killed; if its record lies on disk, rfloor import completes the run"


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
        self._secrets = environment_secrets(os.environ)
        self.keep_secret(known_secrets({"uri": config.uri}))
        with opened(config.uri) as patient:
            self._client, self._ask = patient.client, patient.ask
            found = self._ask(self._find_experiment, config, create=not reading)
        if found is None:
            known = [one.name for one in self._ask(self._client.search_experiments)]
            raise BadInput(
                f"MLflow has no experiment called {config.experiment!r}: {nearest(config.experiment, known)}"
            )
        self._experiment: str = found

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
            created = self._client.create_experiment(config.experiment, location, tags=saved_view())
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
        start = _milliseconds(started_at) if started_at else None
        run_id = self._create_run(
            record_id, start_time=start, run_name=self._hidden.text(label)[:NAME_LIMIT], tags=tags
        )
        self._ask(self._client.log_batch, run_id, params=_params(self._hidden.plain(config)))
        return run_id

    def _create_run(self, record_id: str, tags: Mapping[str, str], **run: Any) -> str:
        """Make a record's run, and only one however often MLflow has to be asked.

        Of all calls this one alone adds something each time it is made, and may have done so although its answer was
        lost. Hence whoever asks again looks first, and MLflow's client, which does not, never asks again itself. What
        remains is a server that makes the run after it was looked at.
        """
        attempts = itertools.count()
        tags = {RECORD_TAG: record_id, PROCESS_TAG: this_process(), **self._hidden.plain(tags)}

        def create() -> str:
            if next(attempts):
                for made in self._client.search_runs([self._experiment], filter_string=_of(record_id)):
                    if made.data.tags.get(RECORD_TAG) == record_id:
                        return str(made.info.run_id)
            made = self._client.create_run(self._experiment, tags=tags, **run)
            return str(made.info.run_id)

        return str(self._ask(create))

    def open_experiment(self, registration: Registration) -> str:
        """Start the run of an experiment; its cells have runs of their own.

        It begins when it is opened, whenever that is: what was registered earlier says so itself.

        Args:
            registration: What was fixed beforehand.

        Returns:
            The run's id.

        Raises:
            TrackingDown: See the class.
        """
        name = f"experiment {registration.experiment.name}"
        opened = {LOGGED_TAG: faults.now().isoformat(timespec="milliseconds")}
        return self.open(registration.record_id, name, {}, registration.tags() | opened)

    def open_report(self, experiment: ExperimentConfig) -> str:
        """The run of an experiment that measures nothing and tells of all runs: started once, and found again.

        Raises:
            TrackingDown: See the class.
        """
        record_id = f"{REPORT}-{experiment.name}"
        run_id, _ = self.known(record_id).get(record_id, ("", False))
        told = {"kind": REPORT, "experiment": experiment.name, "mlflow.note.content": experiment.question}
        return run_id or self.open(record_id, f"{REPORT} {experiment.name}", {}, told)

    def logged(self, run_id: str) -> Logged:
        """Since when MLflow has a registration.

        Args:
            run_id: Of the experiment's own run.

        Raises:
            TrackingDown: See the class.
        """
        return Logged.told(run_id, self._ask(self._client.get_run, run_id).data.tags.get(LOGGED_TAG, ""))

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
            self._ask(self._client.set_tag, run_id, "verdict", self._hidden.text("\n".join(verdicts))[:TAG_LIMIT])
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
        self.take_up(run_id)
        ended = self._ask(self._client.get_run, run_id).info.status != "RUNNING"
        there = {artifact.path for artifact in self._ask(self._client.list_artifacts, run_id)}
        if REGISTRATION not in there:
            self._ask(self._log_artifact, run_id, REGISTRATION, file)
        if not ended:
            self._ask(self._client.set_terminated, run_id, status="FINISHED")
        return not ended or REGISTRATION not in there

    def close(self, run_id: str, record: Record, files: Mapping[str, Path], late: bool = False) -> None:
        """Log a record's results into its run and end it.

        Everything logged is dated by the record, so that logging it again adds nothing.

        Args:
            run_id: Of `open`.
            record: What came of the cell.
            files: Artifacts: the name to give each, and where it lies.
            late: Whether the run may lack its parameters.

        Raises:
            TrackingDown: See the class.
        """
        from mlflow.entities import Metric, RunTag

        record = Record(**self._hidden.plain(vars(record)))
        self._ask(self._log_artifacts, run_id, files, record.config)  # which reads the run, so before it grows
        end = _milliseconds(record.started_at) + round(record.wall_s * 1000)
        metrics = [Metric(name, float(value), end, 0) for name, value in record.metrics.items()]
        for name, times in (("step_time_ms", record.step_times_ms), ("call_time_us", record.call_times_us)):
            metrics += [Metric(name, float(time), end, place) for place, time in enumerate(times)]
        self._ask(
            self._client.log_batch,
            run_id,
            metrics=metrics,
            params=_params(record.config) if late else [],
            tags=[RunTag(key, value) for key, value in tags(record).items()],
        )
        status = STATUS.get(record.outcome, "FAILED")
        self._ask(self._client.set_terminated, run_id, status=status, end_time=end)

    def _log_artifacts(self, run_id: str, files: Mapping[str, Path], config: Mapping[str, Any]) -> None:
        """Log a cell's configuration, and those of its files that are there."""
        with tempfile.TemporaryDirectory(prefix="rfloor-") as temporary:
            for name, file in files.items():
                if file.exists():
                    self._put(file, Path(temporary, name))
            Path(temporary, CONFIG).write_text(yaml.dump(config, Dumper=DUMPER, default_flow_style=False))
            self._client.log_artifacts(run_id, temporary)
        forget(run_id)

    def _log_artifact(self, run_id: str, name: str, file: Path, folder: str = "") -> None:
        """Log a file under another name."""
        with tempfile.TemporaryDirectory(prefix="rfloor-") as temporary:
            place = Path(temporary, name)
            self._put(file, place)
            self._client.log_artifact(run_id, str(place), folder or None)

    def _put(self, file: Path, place: Path) -> None:
        """Put a file elsewhere, byte by byte and however large, but for secrets that others left in it."""
        if file.name.endswith(".trace.json.gz"):
            traces.clean(file, place, self._hidden)
            return
        content = records.read_json(file) if file.suffix == ".json" else None
        if file.suffix == ".log":
            logs.clean(file, place, self._hidden)
        elif (kept := self._hidden.plain(content)) != content:
            records.write_json(place, kept)
        else:
            place.symlink_to(file.absolute())

    def close_left(self) -> int:
        """End the runs that killed processes left running, as KILLED, and return how many there were.

        They say so, and are not complete: an import may still find their records, and `take_up` them.

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

    def take_up(self, run_id: str) -> None:
        """Make a run that `close_left` has ended this process's, as if this process had begun it.

        Raises:
            TrackingDown: See the class.
        """
        if self._ask(self._client.get_run, run_id).data.tags.get("reason") == LEFT:
            self._ask(self._client.set_tag, run_id, PROCESS_TAG, this_process())
            self._ask(self._client.update_run, run_id, status="RUNNING")
            self._ask(self._client.delete_tag, run_id, "reason")

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
            ended = run.info.status != "RUNNING" and tags.get("reason") != LEFT
            complete = ended and ("outcome" in tags or tags.get("kind") == KIND)
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
                if tags.get("kind") == REPORT or (sweeps and tags.get("sweep_id") not in sweeps):
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

    def has(self, run_id: str, name: str) -> bool:
        """Whether a run has an artifact of this name.

        Raises:
            TrackingDown: See the class.
        """
        return name in {artifact.path for artifact in self._ask(self._client.list_artifacts, run_id)}

    def _artifact(self, run_id: str, name: str, folder: str) -> Path:
        """Bring a run's artifact here.

        Raises:
            TrackingDown: See the class.
            BadRecord: MLflow answers, and the run has none.
        """
        try:
            return Path(self._client.download_artifacts(run_id, name, folder))
        except Exception:  # of many kinds, and of the same for what is not there and for what cannot be had now
            if not self.has(run_id, name):
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


def _params(config: Mapping[str, Any]) -> list[Param]:
    """The leaves of a configuration as MLflow's parameters."""
    from mlflow.entities import Param

    leaves = dict(flatten(config))
    return [
        Param(key, value[:PARAM_LIMIT])
        for key, value in leaves.items()
        # Of the parameters that differ the UI compares three unasked; a plugin under its own name is no news.
        if not (key.endswith(".plugin") and value == leaves.get(f"{key.removesuffix('plugin')}name"))
    ]


def _missing_database(uri: str) -> Path | None:
    """The SQLite file of a tracking URI that is not there, which MLflow would make."""
    file = sqlite_file(uri)
    return file if file and not file.exists() else None


def _of(record_id: str) -> str:
    """A filter for the runs of a record; for all, where its name has no place in one."""
    return f"tags.`{RECORD_TAG}` = '{record_id}'" if re.fullmatch(r"[\w.-]+", record_id) else ""


def _milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)

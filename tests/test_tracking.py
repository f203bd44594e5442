"""Records to MLflow, against real SQLite stores: what a run holds, and that nothing is logged twice or lost."""

import contextlib
import functools
import http.server
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    TEMPORARILY_UNAVAILABLE,
    UNAUTHENTICATED,
)
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils
from planning import Plan
from sqlalchemy.exc import IntegrityError, OperationalError
from test_record import made_up_cell, made_up_record

from registry import cli, importing, mlflow_client, patience, shown
from registry import record as records
from registry import registration as registrations
from registry.archive import everything_in
from registry.call import Call
from registry.compose import Composer
from registry.experiment_runs import open_runs
from registry.importing import import_records
from registry.locks import locked
from registry.mlflow_client import TrackingDown
from registry.outcome import Outcome, Refusal
from registry.plan import Cell
from registry.process import has_ended, this_process
from registry.record import Record
from registry.registration import Registration, register
from registry.run import run_cell
from registry.schema import TrackingConfig, what_is_measured
from registry.shown import artifacts
from registry.tracking import LEFT, PROCESS_TAG, Tracker

# sqlalchemy about what MLflow does
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

ROOT = Path(__file__).parent.parent
METRICS = [
    "step_time_ms",
    "median_tpot_ms",
    "mean_tpot_ms",
    "p90_tpot_ms",
    "p99_tpot_ms",
    "std_tpot_ms",
    "event_median_tpot_ms",
    "ttft_ms",
    "tokens_per_s",
    "r_floor",
    "floor_ms",
    "mbu",
    "mbu_attainable",
    "weight_bytes",
    "kv_bytes",
    "streamed_bytes",
    "peak_memory_gb",
    "decode_peak_memory_gb",
    "usd_per_mtok",
    "logit_cosine",
    "top1_agreement",
]
STATUS = {
    Outcome.OK: "FINISHED",
    Outcome.OOM: "FINISHED",
    Outcome.UNSUPPORTED: "FINISHED",
    Outcome.INTERRUPTED: "KILLED",
    Outcome.MISSING_DEPENDENCY: "FAILED",
    Outcome.INCORRECT: "FAILED",
    Outcome.TIMEOUT: "FAILED",
    Outcome.CRASH: "FAILED",
}


class Store:
    """One MLflow database of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = TrackingConfig("local", f"sqlite:///{folder}/mlflow.db", "rfloor", str(folder / "mlartifacts"))

    @functools.cached_property
    def client(self) -> MlflowClient:
        return MlflowClient(self.config.uri)

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name("rfloor")
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    def series(self, run: Run, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, name)]

    def artifact(self, run: Run, name: str) -> bytes:
        return Path(self.client.download_artifacts(run.info.run_id, name)).read_bytes()

    def everything(self) -> list[Any]:
        """All that can be seen of every run."""
        return [
            (
                run.to_dictionary(),
                {name: self.series(run, name) for name in run.data.metrics},
                {file.path: file.file_size for file in self.client.list_artifacts(run.info.run_id)},
            )
            for run in self.runs()
        ]


@functools.cache
def prepared_database(folder: Path) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    MlflowClient(f"sqlite:///{folder}/template.db").get_experiment_by_name("rfloor")
    return folder / "template.db"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_database(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that a tracker makes in the environment do not outlive the test."""
    for name, value in mlflow_client.QUIET_CLIENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    shutil.copy(template, tmp_path / "mlflow.db")
    return Store(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where records lie."""
    made = tmp_path / "records"
    made.mkdir()
    return made


@pytest.fixture
def cell(composer: Composer) -> Cell:
    return made_up_cell(composer)


def keep(folder: Path, record: Record, log: bytes = b"loading\n") -> Path:
    """Write a record and its log, as a cell does."""
    file = records.write(record, folder)
    file.with_suffix(".log").write_bytes(log)
    return file


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What MLflow and its client would have printed between the lines of a sweep."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def log(store: Store, record: Record, files: Mapping[str, Path] | None = None) -> Run:
    tracker = Tracker(store.config)
    run_id = tracker.open(record.record_id, record.label, record.config, {})
    tracker.close(run_id, record, files or {})
    return store.client.get_run(run_id)


# One run


def test_a_run_holds_all_of_a_measured_cell(store: Store, folder: Path, cell: Cell) -> None:
    record = made_up_record(cell, warnings=["unsteady: a", "throttled: b"])
    file = keep(folder, record)
    tracker = Tracker(store.config)

    run_id = tracker.open(record.record_id, record.label, record.config, {"cell_id": record.cell_id})
    opened = store.client.get_run(run_id)
    assert (opened.info.status, opened.info.run_name) == ("RUNNING", record.label)
    assert opened.data.tags["cell_id"] == record.cell_id
    assert opened.data.params["quant.name"] == "nf4"
    assert opened.data.metrics == {}

    tracker.close(run_id, record, artifacts(file))
    [run] = store.runs()
    assert run.info.status == "FINISHED"
    assert set(METRICS) <= set(run.data.metrics)
    assert run.data.metrics == pytest.approx(record.metrics | {"step_time_ms": 2.1})
    assert store.series(run, "step_time_ms") == [(0, 1.9), (1, 2.0), (2, 2.1)]
    assert store.series(run, "r_floor") == [(0, pytest.approx(0.672576))]

    leaves = dict(shown.flatten(record.config))
    assert leaves["protocol.context"] == "100"
    left_out = {"backend.plugin", "quant.plugin", "attention.plugin"}  # each is called what its option is called
    assert run.data.params == {key: value for key, value in leaves.items() if key not in left_out}

    told = {key: value for key, value in run.data.tags.items() if key != "mlflow.runName"}
    assert not has_ended(told.pop("rfloor.process"))
    assert told == {
        "rfloor.record_id": "00c0ffee",
        "outcome": "ok",
        "warnings": "unsteady: a; throttled: b",
        "mlflow.note.content": "- unsteady: a\n- throttled: b",
        "cell_id": "0123456789abcdef",
        "sweep_id": "20260701-101010-abcd",
        "gpu_name": "NVIDIA L4",
        "driver": "570.86.15",
        "git_commit": "c0ffee",
        "git_dirty": "false",
        "version.torch": "2.13.0",
    }
    assert {f.path for f in store.client.list_artifacts(run_id)} == {"cell.json", "worker.log", "config.yaml"}
    assert store.artifact(run, "cell.json") == file.read_bytes()
    assert store.artifact(run, "worker.log") == b"loading\n"
    assert yaml.safe_load(store.artifact(run, "config.yaml")) == json.loads(json.dumps(record.config))
    assert (store.folder / "mlartifacts").is_dir()


def test_a_plugin_under_another_name_is_a_parameter(store: Store) -> None:
    config = {"attention": {"name": "sdpa-math", "plugin": "sdpa", "options": {}}, "quant": {"plugin": "nf4"}}
    run = log(store, made_up_record(config=config))
    assert run.data.params == {"attention.name": "sdpa-math", "attention.plugin": "sdpa", "quant.plugin": "nf4"}


@pytest.fixture(scope="module")
def shared(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for tests that look at their own run alone."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(template, folder / "mlflow.db")
    return Store(folder)


@pytest.mark.parametrize("outcome", Outcome)
def test_an_outcome_is_a_run_s_status_and_its_reason_a_tag(shared: Store, outcome: Outcome) -> None:
    run = log(shared, made_up_record(record_id=outcome.value, outcome=outcome))
    assert run.info.status == STATUS[outcome]
    assert run.data.tags["outcome"] == outcome.value
    assert (run.data.tags["reason"], run.data.tags["remedy"]) == ("no such kernel", "use another")
    assert run.data.tags["mlflow.note.content"] == f"**{outcome.value}**: no such kernel. use another"
    assert run.data.metrics == {}


def test_a_run_has_the_times_of_its_record(shared: Store) -> None:
    """Logged at once or months later: MLflow shows when the cell was measured, and for how long."""
    record = made_up_record()
    tracker = Tracker(shared.config)
    run_id = tracker.open(record.record_id, record.label, record.config, {}, record.started_at)
    tracker.close(run_id, record, {})
    info = shared.client.get_run(run_id).info
    assert (info.start_time, info.end_time) == (1_782_900_610_250, 1_782_900_641_750)


def test_a_large_log_that_is_no_text_is_kept_byte_by_byte(shared: Store, folder: Path) -> None:
    log_bytes = b"\xff\xfe\x00 50%\r\xe2\x82" + b"a line of a long log\n" * 400_000
    file = keep(folder, made_up_record(), log_bytes)
    run = log(shared, made_up_record(), artifacts(file))
    assert len(log_bytes) > 8_000_000
    assert shared.artifact(run, "worker.log") == log_bytes


def test_a_cell_without_a_worker_has_no_log(shared: Store, folder: Path) -> None:
    file = records.write(made_up_record(), folder)
    run = log(shared, made_up_record(), artifacts(file))
    assert {f.path for f in shared.client.list_artifacts(run.info.run_id)} == {"cell.json", "config.yaml"}


def test_what_is_longer_than_mlflow_takes_is_cut(shared: Store, cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    steps = [float(i) for i in range(2500)]  # a batch holds 1000 metrics, 100 parameters
    record = made_up_record(
        cell,
        step_times_ms=steps,
        label="l" * 300,
        reason="r" * 9000,
        config={"many": {f"key{i}": i for i in range(250)}, "long": "v" * 7000},
    )
    run = log(shared, record)
    assert shared.series(run, "step_time_ms") == list(enumerate(steps))
    assert len(run.data.params) == 251
    assert run.data.params["long"] == "v" * 6000
    assert run.data.tags["reason"] == "r" * 8000
    assert run.info.run_name == "l" * 250
    assert warned(caplog) == []


@pytest.mark.parametrize(
    ("config", "leaves"),
    [
        ({}, {}),
        ({"a": {"b": {"c": 1}}, "d": 2.5}, {"a.b.c": "1", "d": "2.5"}),
        ({"a": None, "b": [], "c": {}, "d": {"e": None}}, {}),
        ({"a": [1, "x"], "b": False, "c": 0, "d": ""}, {"a": "[1, 'x']", "b": "False", "c": "0", "d": ""}),
    ],
)
def test_flatten(config: dict[str, Any], leaves: dict[str, str]) -> None:
    assert dict(shown.flatten(config)) == leaves


def test_no_secret_of_the_configuration_is_a_parameter(composer: Composer) -> None:
    cell = made_up_cell(composer, "tracking.uri='http://user:hunter2@host'")
    assert cell.config.tracking.uri == "http://user:hunter2@host"
    assert "hunter2" not in json.dumps(what_is_measured(cell.config))


# The experiment


def test_an_experiment_is_made_once_with_columns_for_the_ui(store: Store) -> None:
    Tracker(store.config)
    tracker = Tracker(store.config)
    experiment = store.client.get_experiment_by_name("rfloor")
    assert experiment.artifact_location == (store.folder / "mlartifacts").as_uri()
    view = json.loads(experiment.tags["mlflow.sharedViewState.rfloor"])
    columns = json.loads(view["state"])["selectedColumns"]
    assert {"params.`quant.name`", "metrics.`r_floor`", "metrics.`median_tpot_ms`", "tags.`outcome`"} <= set(columns)
    assert tracker.page.startswith(f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=rfloor")


def test_every_column_of_the_view_is_something_that_is_logged(store: Store, cell: Cell) -> None:
    run = log(
        store,
        made_up_record(cell, experiment="matrix", measured={"kernels": {"void marlin::Marlin<1>(int4 const*)": 196}}),
    )
    assert run.data.tags["kernels"] == "marlin::Marlin x196"
    kinds = {"params": run.data.params, "metrics": run.data.metrics, "tags": run.data.tags}
    logged = {f"{kind}.{name}" for kind, names in kinds.items() for name in names}
    assert set(shown.VIEW_COLUMNS) <= logged


@pytest.mark.parametrize(
    ("folder", "location"),
    [(None, "mlruns"), ("s3://bucket/runs", "s3://bucket/runs"), ("relative", "/relative")],
)
def test_where_artifacts_go(store: Store, monkeypatch: pytest.MonkeyPatch, folder: str | None, location: str) -> None:
    monkeypatch.chdir(store.folder)
    store.config.artifacts = folder
    Tracker(store.config)
    assert location in store.client.get_experiment_by_name("rfloor").artifact_location


def test_two_sweeps_that_make_the_experiment_at_once_share_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Tracker(store.config)
    look, looked = MlflowClient.get_experiment_by_name, []

    def too_early(self: MlflowClient, name: str) -> Any:
        looked.append(name)
        return None if len(looked) == 1 else look(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)
    log(store, made_up_record())
    assert len(looked) == 2
    monkeypatch.undo()
    assert len(store.runs()) == 1


def test_a_deleted_experiment_is_told_with_what_would_help(store: Store) -> None:
    Tracker(store.config)
    number = store.client.get_experiment_by_name("rfloor").experiment_id
    store.client.delete_experiment(number)
    with pytest.raises(TrackingDown, match=f"'rfloor' is deleted: .*restore --experiment-id {number}"):
        Tracker(store.config)


# Import


def test_import_logs_each_record_once(store: Store, folder: Path, cell: Cell) -> None:
    for index in range(3):
        keep(folder, made_up_record(cell, record_id=f"r{index}", index=index))
    keep(folder / "deeper" / "down", made_up_record(record_id="r3", index=3))
    assert import_records(folder, store.config) == (Counter(imported=4), [])
    first = store.everything()
    assert sorted(run["data"]["tags"]["rfloor.record_id"] for run, *_ in first) == ["r0", "r1", "r2", "r3"]
    for _ in range(2):
        assert import_records(folder, store.config) == (Counter(present=4), [])
        assert store.everything() == first


def test_a_record_that_lies_in_two_places_is_logged_once(store: Store, folder: Path) -> None:
    keep(folder / "here", made_up_record())
    keep(folder / "there", made_up_record())
    assert import_records(folder, store.config) == (Counter(imported=1, present=1), [])


def test_a_record_logged_by_its_sweep_is_present(store: Store, folder: Path, cell: Cell) -> None:
    record = made_up_record(cell)
    log(store, record, artifacts(keep(folder, record)))
    before = store.everything()
    assert import_records(folder, store.config) == (Counter(present=1), [])
    assert store.everything() == before


@pytest.mark.parametrize("reached", ["create_run", "log_artifacts", "log_batch"])
def test_import_completes_a_run_that_was_cut_off(
    store: Store, folder: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch, reached: str
) -> None:
    """However far its sweep came, and without a second point a step."""
    record = made_up_record(cell)
    file = keep(folder, record)
    after, real = {"create_run": 0, "log_artifacts": 0, "log_batch": 1}[reached], []
    name = "log_batch" if reached == "create_run" else reached
    call = getattr(MlflowClient, name)

    def cut_off(*arguments: Any, **keywords: Any) -> Any:
        if len(real) == after:
            if reached == "log_artifacts":
                call(*arguments, **keywords)
            raise ConnectionError("gone")
        real.append(name)
        return call(*arguments, **keywords)

    monkeypatch.setattr(MlflowClient, name, cut_off)
    with pytest.raises(TrackingDown, match="gone"):
        log(store, record, artifacts(file))
    monkeypatch.undo()
    [run] = store.runs()
    assert run.info.status == "RUNNING"

    assert import_records(folder, store.config) == (Counter(completed=1), [])
    [whole] = store.runs()
    assert whole.info.run_id == run.info.run_id
    assert whole.info.status == "FINISHED"
    assert set(METRICS) <= set(whole.data.metrics)
    assert whole.data.params["protocol.context"] == "100"
    assert store.series(whole, "step_time_ms") == [(0, 1.9), (1, 2.0), (2, 2.1)]
    assert {f.path for f in store.client.list_artifacts(run.info.run_id)} == {
        *("cell.json", "worker.log", "config.yaml")
    }
    assert import_records(folder, store.config) == (Counter(present=1), [])


def close_as_killed(store: Store) -> None:
    """Make the one run that of a process whose PID is another's now, and end it as the next sweep does."""
    [run] = store.runs()
    process = json.dumps(json.loads(this_process()) | {"start": "1"})
    store.client.set_tag(run.info.run_id, PROCESS_TAG, process)
    assert Tracker(store.config).close_left() == 1
    [left] = store.runs()
    assert (left.info.status, left.data.tags["reason"]) == ("KILLED", LEFT)


@pytest.mark.parametrize("reached", ["open", "log_artifacts", "log_batch"])
def test_import_completes_a_run_that_was_closed_as_a_killed_process_s(
    store: Store, folder: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch, reached: str
) -> None:
    """However far that process came; and the run no longer says that it was killed."""
    record, tracker = made_up_record(cell), Tracker(store.config)
    file = keep(folder, record)
    run_id = tracker.open(record.record_id, record.label, record.config, {})
    if reached != "open":
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, {"log_artifacts": "log_batch", "log_batch": "set_terminated"}[reached], None)
            with pytest.raises(TrackingDown):
                tracker.close(run_id, record, artifacts(file))
    close_as_killed(store)
    assert import_records(folder, store.config) == (Counter(completed=1), [])
    [whole] = store.runs()
    assert (whole.info.status, whole.data.tags["outcome"]) == ("FINISHED", "ok")
    assert "reason" not in whole.data.tags
    assert not has_ended(whole.data.tags[PROCESS_TAG])
    assert store.series(whole, "step_time_ms") == [(0, 1.9), (1, 2.0), (2, 2.1)]
    assert {f.path for f in store.client.list_artifacts(run_id)} == {"cell.json", "worker.log", "config.yaml"}
    assert import_records(folder, store.config) == (Counter(present=1), [])


def test_an_experiment_s_run_that_was_closed_so_goes_on(store: Store, folder: Path, plan: Plan) -> None:
    """It is the new process's, which nobody closes for it; and an import alone ends it in order."""
    [registration] = register("sweep", [(0, plan("experiment=graphs_ab", "model=tiny", "context=64"))], 0)
    call = Call("sweep", Tracker(store.config), lambda _: None)
    open_runs([registration], folder, call)
    close_as_killed(store)
    open_runs([registration], folder, call)
    [run] = store.runs()
    assert run.info.status == "RUNNING"
    assert "reason" not in run.data.tags
    assert Tracker(store.config).close_left() == 0
    close_as_killed(store)
    assert import_records(folder, store.config) == (Counter(completed=1), [])
    [run] = store.runs()
    assert run.info.status == "FINISHED"
    assert "reason" not in run.data.tags


def test_a_closed_run_leaves_nothing_of_mlflow_s_in_memory(store: Store, folder: Path, cell: Cell) -> None:
    """It keeps what reaches a run's artifacts of the last thousand runs."""
    record = made_up_record(cell)
    log(store, record, artifacts(keep(folder, record)))
    [run] = store.runs()
    assert run.info.run_id not in utils._artifact_repos_cache


@pytest.mark.parametrize("helps", [True, False])
def test_many_records_are_imported_by_two_processes(
    store: Store, folder: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    """Each once, whatever becomes of the second one; a record that lies in two places is one process's."""
    monkeypatch.setattr(importing, "MANY", 5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for index in range(12):
        keep(folder, made_up_record(cell, record_id=f"r{index}", index=index))
        keep(folder / "copies", made_up_record(cell, record_id=f"r{index}", index=index))
    if not helps:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
    close, closed = Tracker.close, []
    monkeypatch.setattr(Tracker, "close", lambda *args, **named: (close(*args, **named), closed.append(1)))
    assert import_records(folder, store.config) == (Counter(imported=12, present=12), [])
    assert 0 < len(closed) < 12 if helps else len(closed) == 12
    assert sorted(run.data.tags["rfloor.record_id"] for run in store.runs()) == sorted(f"r{i}" for i in range(12))
    assert {run.info.status for run in store.runs()} == {"FINISHED"}
    assert import_records(folder, store.config) == (Counter(present=24), [])


def test_what_is_no_record_is_told_and_the_rest_imported(store: Store, folder: Path) -> None:
    keep(folder, made_up_record())
    (folder / "a.json").write_text("{}")
    (folder / "b.json").write_text("[1, 2")
    (folder / "c.json").mkdir()
    (folder / "notes.txt").write_text("no record, and not asked")
    counts, problems = import_records(folder, store.config)
    assert counts == Counter(imported=1)
    assert [problem.partition(": ")[0] for problem in problems] == [str(folder / f"{name}.json") for name in "abc"]
    assert all(problem.partition(": ")[2] for problem in problems)


def test_runs_of_others_in_the_experiment_are_left_alone(store: Store, folder: Path) -> None:
    Tracker(store.config)
    experiment = store.client.get_experiment_by_name("rfloor").experiment_id
    run_id = store.client.create_run(experiment, run_name="theirs").info.run_id
    theirs = store.client.get_run(run_id).to_dictionary()
    keep(folder, made_up_record())
    assert import_records(folder, store.config) == (Counter(imported=1), [])
    assert store.client.get_run(run_id).to_dictionary() == theirs


def test_import_finds_its_runs_beyond_one_page(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(5):
        keep(folder, made_up_record(record_id=f"r{index}", index=index))
    assert import_records(folder, store.config)[0] == Counter(imported=5)
    search = MlflowClient.search_runs

    def small_pages(self: MlflowClient, experiments: list[str], **keywords: Any) -> Any:
        return search(self, experiments, **(keywords | {"max_results": 2}))

    monkeypatch.setattr(MlflowClient, "search_runs", small_pages)
    assert import_records(folder, store.config)[0] == Counter(present=5)


def sweep_logs(store: Store, folder: Path, record: Record) -> None:
    """What a sweep does when a cell ends: the run is there before the record is."""
    Tracker(store.config).open(record.record_id, record.label, record.config, {})
    keep(folder, record)


def test_what_a_sweep_records_while_an_import_begins_gets_no_second_run(
    store: Store, folder: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_worst_moment(folder: Path) -> Any:
        sweep_logs(store, folder, made_up_record(cell))
        return everything_in(folder)

    monkeypatch.setattr(importing, "everything_in", at_the_worst_moment)
    assert import_records(folder, store.config) == (Counter(completed=1), [])
    [run] = store.runs()
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("reached", ["complete", "cut off"])
def test_what_another_import_logs_meanwhile_gets_no_second_run(
    store: Store, folder: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch, reached: str
) -> None:
    """Between the first look at all runs, and the moment in which a record is held."""
    record = made_up_record(cell)
    file = keep(folder, record)
    held = []

    @contextlib.contextmanager
    def late(place: Path, *arguments: float) -> Iterator[None]:
        with locked(place, *arguments):
            if place == file:
                held.append(place)
                run_id = Tracker(store.config).open(record.record_id, record.label, record.config, {})
                if reached == "complete":
                    Tracker(store.config).close(run_id, record, artifacts(file))
            yield

    monkeypatch.setattr(importing, "locked", late)
    counts, _ = import_records(folder, store.config)
    assert counts == (Counter(present=1) if reached == "complete" else Counter(completed=1))
    assert held == [file]
    [run] = store.runs()
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "ok")


def test_a_registration_that_an_import_finds_at_once_gets_no_second_run(
    store: Store, folder: Path, composer: Composer, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import comes upon the file as soon as it is there, while the sweep goes on."""
    cell = plan("experiment=graphs_ab", "model=tiny", "context=64")
    [registration] = register("sweep", [(0, cell)], 0)
    write = registrations.write

    def found_at_once(one: Registration, folder: Path) -> Path:
        file = write(one, folder)
        import_records(folder, store.config)
        return file

    monkeypatch.setattr(registrations, "write", found_at_once)
    call = Call("sweep", Tracker(store.config), lambda _: None)
    [opened] = open_runs([registration], folder, call)
    assert call.tracking_error == ""
    [run] = store.runs()
    assert opened.logged
    assert run.info.run_id == opened.logged.run_id
    assert store.artifact(run, "registration.json") == opened.file.read_bytes()


def test_import_completes_an_experiment_s_run_without_its_registration(
    store: Store, folder: Path, composer: Composer, plan: Plan
) -> None:
    [registration] = register("sweep", [(0, plan("experiment=graphs_ab", "model=tiny", "context=64"))], 0)
    file = registrations.write(registration, folder)
    Tracker(store.config).open_experiment(registration)
    assert import_records(folder, store.config) == (Counter(completed=1), [])
    [run] = store.runs()
    assert run.info.status == "FINISHED"
    assert store.artifact(run, "registration.json") == file.read_bytes()


@pytest.mark.parametrize("record_id", ["it's", 'a "name"', "a`b", "%", "20260701-1_a.b"])
def test_a_record_of_any_name_is_imported_once(store: Store, folder: Path, record_id: str) -> None:
    keep(folder, made_up_record(record_id="another"))
    keep(folder, made_up_record(record_id=record_id, index=1))
    assert import_records(folder, store.config) == (Counter(imported=2), [])
    assert import_records(folder, store.config) == (Counter(present=2), [])


def test_of_two_runs_of_a_record_the_complete_one_counts(store: Store, folder: Path, cell: Cell) -> None:
    record = made_up_record(cell)
    file = keep(folder, record)
    tracker = Tracker(store.config)
    runs = [tracker.open(record.record_id, record.label, record.config, {}) for _ in range(3)]
    tracker.close(runs[1], record, artifacts(file))
    assert tracker.known() == tracker.known(record.record_id) == {record.record_id: (runs[1], True)}
    assert import_records(folder, store.config) == (Counter(present=1), [])


# What may pass


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks again without a pause, a few times."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(mlflow_client, "PATIENCE_S", 1.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["create_run", "log_batch", "log_artifacts", "set_terminated"])
@pytest.mark.parametrize("done", [False, True])
def test_a_call_whose_answer_was_lost_is_made_again_and_counts_once(
    store: Store, folder: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch, name: str, done: bool
) -> None:
    """Whether or not MLflow had done what it was asked for."""
    record = made_up_record(cell)
    call, lost = getattr(MlflowClient, name), []

    def lose_two(*arguments: Any, **keywords: Any) -> Any:
        if len(lost) == 2:
            return call(*arguments, **keywords)
        lost.append(name)
        if done:
            call(*arguments, **keywords)
        raise MlflowException("API request to http://host failed with timeout exception", INTERNAL_ERROR)

    monkeypatch.setattr(MlflowClient, name, lose_two)
    log(store, record, artifacts(keep(folder, record)))
    assert len(lost) == (1 if done and name == "create_run" else 2)
    monkeypatch.undo()
    [run] = store.runs()
    assert run.info.status == "FINISHED"
    assert store.series(run, "step_time_ms") == [(0, 1.9), (1, 2.0), (2, 2.1)]
    assert import_records(folder, store.config) == (Counter(present=1), [])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MlflowException("busy", TEMPORARILY_UNAVAILABLE), 3),
        (MlflowException("no such parameter", INVALID_PARAMETER_VALUE), 1),
        (MlflowException("who are you", UNAUTHENTICATED), 1),
        (OperationalError("SELECT 1", {}, Exception("down")), 3),
        (IntegrityError("CREATE TABLE runs", {}, Exception("another makes it")), 3),
        (OSError("the disk is full"), 1),
    ],
)
def test_only_what_may_pass_is_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, asked: int
) -> None:
    look, looked = MlflowClient.get_experiment_by_name, []

    def fail_twice(self: MlflowClient, name: str) -> Any:
        looked.append(name)
        if len(looked) < 3:
            raise error
        return look(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", fail_twice)
    if asked == 1:
        with pytest.raises(TrackingDown):
            Tracker(store.config)
    else:
        assert Tracker(store.config).known() == {}
    assert looked == ["rfloor"] * asked


class Deaf(http.server.BaseHTTPRequestHandler):
    """Takes the experiment for granted, and never answers what would make a run."""

    def do_GET(self) -> None:
        answer = b'{"experiment": {"experiment_id": "1", "name": "rfloor", "lifecycle_stage": "active"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_POST(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("wanted", ["", "5"])
def test_a_server_is_asked_for_a_run_once_whatever_the_user_s_settings(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """MLflow's client would ask again without looking whether there is a run already."""
    if wanted:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", wanted)
    else:
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setattr(mlflow_client, "PATIENCE_S", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Deaf) as deaf:
        deaf.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=deaf.serve_forever).start()
        try:
            tracker = Tracker(TrackingConfig("server", f"http://127.0.0.1:{deaf.server_port}", "rfloor"))
            with pytest.raises(TrackingDown, match="Remote end closed connection"):
                tracker.open("r0", "label", {}, {})
        finally:
            deaf.shutdown()
    assert deaf.asked == ["/api/2.0/mlflow/runs/create"]  # type: ignore[attr-defined]


def test_a_database_that_others_open_all_the_time_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_client, "OPENING_S", 0.0)
    with locked(store.folder), pytest.raises(TrackingDown, match=r"others have been opening .*/mlflow\.db for 0 s"):
        Tracker(store.config)
    Tracker(store.config)


# The command


def rfloor_import(store: Store, folder: Path, *overrides: str) -> int:
    where = (f"tracking.uri={store.config.uri}", f"tracking.artifacts={store.config.artifacts}")
    return cli.main(["import", str(folder), *where, *overrides])


def test_rfloor_import(store: Store, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(folder, made_up_record())
    assert rfloor_import(store, folder) == 0
    assert rfloor_import(store, folder) == 0
    assert capsys.readouterr() == (
        "1 imported, 0 completed, 0 present\n0 imported, 0 completed, 1 present\n",
        "",
    )
    assert len(store.runs()) == 1


def test_rfloor_import_exits_with_1_for_what_is_no_record(
    store: Store, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(folder, made_up_record())
    (folder / "bad.json").write_text("{}")
    assert rfloor_import(store, folder) == 1
    out, err = capsys.readouterr()
    assert out == "1 imported, 0 completed, 0 present\n"
    assert err == f"rfloor: no record: {folder / 'bad.json'}: schema version None, this rfloor reads 1\n"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["tracking.urn=x"], "tracking.urn"),
        (["tracking=lokal"], "did you mean local?"),
        (["tracking.uri=ftp://me:hunter2@host"], "ftp://***@host"),
        (["tracking.uri=http://me:hunter2,x@host"], "tracking.uri=http://***@host: several values are a sweep"),
        (["tracking.experiment=''"], "tracking.experiment is empty"),
    ],
)
def test_rfloor_import_exits_with_2_for_bad_input(
    store: Store, folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    keep(folder, made_up_record())
    assert rfloor_import(store, folder, *overrides) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rfloor: ")
    assert told in err
    assert "hunter2" not in err
    assert store.runs() == []


def test_rfloor_import_exits_with_2_without_a_folder(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert rfloor_import(store, store.folder / "missing") == 2
    assert capsys.readouterr().err == f"rfloor: {store.folder / 'missing'} is no folder\n"


# A server that is down


@pytest.fixture
def dead_server() -> Iterator[str]:
    """An address at which nothing listens, and nothing else will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_server_that_is_down_is_told_within_seconds_and_once(
    dead_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    with pytest.raises(TrackingDown, match="Connection refused"):
        Tracker(TrackingConfig("server", dead_server, "rfloor"))
    assert time.monotonic() - start < 30  # MLflow's own patience is minutes
    assert warned(caplog) == []


def test_rfloor_import_exits_with_1_when_the_server_is_down(
    dead_server: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_client, "PATIENCE_S", 0.0)
    keep(folder, made_up_record())
    assert cli.main(["import", str(folder), "tracking=server", f"tracking.uri={dead_server}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rfloor: MLflow cannot be reached: ")
    assert err.count("\n") == 1, "one line, and no warnings of the client's"


@pytest.mark.parametrize(
    "credentials", ["user:hunter2", "user:hun%2Fter2", "hunter2", "user:hunter2/x", "u:p@hunter2"]
)
@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_no_password_is_in_the_message(
    dead_server: str, monkeypatch: pytest.MonkeyPatch, credentials: str, scheme: str
) -> None:
    monkeypatch.setattr(mlflow_client, "PATIENCE_S", 0.0)
    uri = f"{scheme}://{credentials}@{dead_server.removeprefix('http://')}"
    with pytest.raises(TrackingDown) as caught:
        Tracker(TrackingConfig("server", uri, "rfloor"))
    assert str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.fixture
def refused(composer: Composer, folder: Path) -> Cell:
    """A cell that needs no worker."""
    cell = made_up_cell(composer, f"records={folder}")
    cell.refusal = Refusal(Outcome.UNSUPPORTED, "no such kernel", "use another")
    return cell


class Failing:
    """MLflow going down at one call."""

    def __init__(self, tracker: Tracker, at: str) -> None:
        self._tracker = tracker
        self._at = at

    def __getattr__(self, name: str) -> Any:
        if name == self._at:
            raise TrackingDown(f"gone at {name}")
        return getattr(self._tracker, name)


@pytest.mark.parametrize(("at", "counts"), [("open", Counter(imported=1)), ("close", Counter(completed=1))])
def test_a_cell_keeps_its_record_when_mlflow_goes_down(
    store: Store, folder: Path, refused: Cell, at: str, counts: Counter[str]
) -> None:
    call = Call("sweep", Failing(Tracker(store.config), at), lambda _: None)  # type: ignore[arg-type]
    record = run_cell(refused, 0, 0, call)
    assert (call.tracker, call.tracking_error) == (None, f"gone at {at}")
    [file] = folder.rglob("*.json")
    assert json.loads(file.read_text()) == json.loads(json.dumps(record.plain()))
    assert import_records(folder, store.config) == (counts, [])
    [run] = store.runs()
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "unsupported")


def test_a_cell_that_mlflow_takes_is_present(store: Store, folder: Path, refused: Cell) -> None:
    call = Call("sweep", Tracker(store.config), lambda _: None)
    record = run_cell(refused, 0, 0, call)
    [run] = store.runs()
    assert (run.data.tags["rfloor.record_id"], run.data.tags["outcome"]) == (record.record_id, "unsupported")
    assert run.info.start_time <= run.info.end_time
    assert import_records(folder, store.config) == (Counter(present=1), [])


def test_a_sweep_without_its_server_exits_with_1_and_can_be_imported(
    store: Store, folder: Path, dead_server: str
) -> None:
    """Nothing here can run a CUDA graph on the CPU, so the cell ends benignly and without a worker."""
    ended = subprocess.run(
        [
            *(sys.executable, str(ROOT / "runner.py"), "model=tiny", "gpu=cpu", "execution=cuda_graph"),
            *(f"records={folder}", "tracking=server", f"tracking.uri={dead_server}", "tracking.experiment=mine"),
        ],
        cwd=store.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    [told] = [line for line in ended.stdout.splitlines() if line.startswith("MLflow did not take every run")]
    assert told.endswith(f": rfloor import {folder} tracking.uri={dead_server} tracking.experiment=mine")
    [file] = folder.glob(f"{'[0-9a-f]' * 16}/*.json")
    assert records.read(file).outcome is Outcome.UNSUPPORTED
    assert import_records(folder, store.config) == (Counter(imported=1), [])


# What tracking costs its own process

NO_TORCH = """
import sys
from pathlib import Path
from registry import record as records
from registry.schema import TrackingConfig, what_is_measured
from registry.importing import import_records
from registry.shown import artifacts
from registry.tracking import LEFT, PROCESS_TAG, Tracker
assert "mlflow" not in sys.modules, "MLflow takes seconds to import"
uri, folder = sys.argv[1:]
print(import_records(Path(folder), TrackingConfig("local", uri, "rfloor", folder)))
assert "mlflow" in sys.modules
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_tracking_imports_mlflow_when_it_is_used_and_torch_never(store: Store, folder: Path, cell: Cell) -> None:
    keep(folder, made_up_record(cell))
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, store.config.uri, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "'imported': 1" in done.stdout

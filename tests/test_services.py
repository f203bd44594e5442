"""Many writers at once, and stores that go away: real sweeps against SQLite and an MLflow server on PostgreSQL."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient
from services import Cluster, Server, binaries, cluster, server
from sweeps import ROOT, Sweep, database, launch, wait_for
from test_record import made_up_cell, made_up_record

from registry import mlflow_client, shown, tracking
from registry import record as records
from registry.archive import everything_in
from registry.compose import Composer
from registry.mlflow_client import TrackingDown
from registry.record import Record
from registry.registration import Registration
from registry.schema import TrackingConfig
from registry.tracking import Tracker

POSTGRESQL = binaries() if importlib.util.find_spec("psycopg2") else None
PATIENCE_S = 600  # for 20 processes that share two cores
HELD_UP_S = 50
"""What a store that is gone may add to a sweep, with room for a machine that does other things too: on an idle one
it is some 20 s."""
SMALL = ("protocol.warmup_steps=1", "protocol.measured_steps=3")
TWO_CELLS = ("execution=eager,cuda_graph", *SMALL)
"""One that is measured, and one that is refused without a worker."""

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(POSTGRESQL is None, reason="no PostgreSQL or no psycopg2: make services installs them"),
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated"),  # sqlalchemy about MLflow
]


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that a tracker makes in the environment do not outlive the test."""
    for name, value in mlflow_client.QUIET_CLIENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Cluster]:
    assert POSTGRESQL
    with cluster(POSTGRESQL) as started:
        yield started


@pytest.fixture
def served(request: pytest.FixtureRequest, postgresql: Cluster, tmp_path: Path) -> Iterator[Server]:
    """A server of one worker, or of as many as the parameter says, on a database that nobody has used yet."""
    folder = tmp_path / "server"
    folder.mkdir()
    with server(postgresql.database(f"db{uuid.uuid4().hex}"), folder, getattr(request, "param", 1)) as started:
        yield started


Start = Callable[..., Sweep]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a sweep that logs where the first argument says."""
    started: list[Sweep] = []

    def start(uri: str, *overrides: str) -> Sweep:
        where = [f"tracking.uri={uri}", f"tracking.artifacts={tmp_path}/artifacts"]
        started.append(launch(tmp_path, where, *overrides))
        return started[-1]

    yield start
    for sweep in started:
        sweep.kill()
    for sweep in started:
        shutil.rmtree(sweep.folder)


class Importer:
    """One call of `rfloor import`, in a process of its own."""

    def __init__(self, uri: str, folder: Path, artifacts: Path) -> None:
        where = [f"tracking.uri={uri}", f"tracking.artifacts={artifacts}"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "registry.cli", "import", str(folder), *where],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stdout = self.stderr = ""
        self.code: int | None = None

    def end(self) -> "Importer":
        self.stdout, self.stderr = self._process.communicate(timeout=PATIENCE_S)
        self.code = self._process.returncode
        return self

    def kill(self) -> None:
        with self._process:
            self._process.kill()

    @property
    def counts(self) -> Counter[str]:
        return Counter({name: int(count) for count, name in re.findall(r"(\d+) (\w+)", self.stdout)})


Import = Callable[..., Importer]


@pytest.fixture
def importer(tmp_path: Path) -> Iterator[Import]:
    """Start an import of a folder."""
    started: list[Importer] = []

    def start(uri: str, folder: Path) -> Importer:
        started.append(Importer(uri, folder, tmp_path / "artifacts"))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def prepare(folder: Path, composer: Composer, count: int) -> Path:
    """A folder of records that MLflow has never seen, as a machine without it leaves them."""
    cell = made_up_cell(composer)
    sweep_id = uuid.uuid4().hex
    for index in range(count):
        record = made_up_record(cell, record_id=uuid.uuid4().hex, index=index, sweep_id=sweep_id)
        records.write(record, folder).with_suffix(".log").write_text(f"the log of {record.record_id}\n")
    return folder


def assert_quiet(ended: Sweep | Importer) -> None:
    """All went well and nothing else is told: no lock, no warning, no retry."""
    told = ended.stdout + ended.stderr
    assert ended.code == 0, told
    for word in ("locked", "Traceback", "WARNING", "ERROR", "rror:", "did not take", "retr"):
        assert word not in told, told


def assert_each_once(uri: str, *folders: Path) -> None:
    """Every record under the folders has one run with all that it should hold, and there is no run beside these."""
    kept: dict[str, Record | Registration] = {}
    for folder in folders:
        found, problems = everything_in(folder)
        assert problems == []
        kept |= {one.record_id: one for _, one in found}
    client = MlflowClient(uri)
    experiments = client.search_experiments(ViewType.ALL)
    assert sorted(experiment.name for experiment in experiments) == ["Default", "rfloor"]
    numbers = [experiment.experiment_id for experiment in experiments]
    runs = client.search_runs(numbers, run_view_type=ViewType.ALL, max_results=5000)
    assert Counter(run.data.tags[tracking.RECORD_TAG] for run in runs) == Counter([*kept])
    for run in runs:
        assert_complete(client, run, kept[run.data.tags[tracking.RECORD_TAG]])


def assert_complete(client: MlflowClient, run: Run, one: Record | Registration) -> None:
    """The run holds all of the record, once."""
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert run.data.tags["sweep_id"] == one.sweep_id
    if isinstance(one, Registration):
        assert run.info.status == "FINISHED"
        assert "registration.json" in files
        return
    assert run.info.status == shown.STATUS.get(one.outcome, "FAILED")
    assert run.data.tags["outcome"] == one.outcome
    assert run.data.params["protocol.context"] == str(one.config["protocol"]["context"])
    assert set(one.metrics) <= set(run.data.metrics)
    history = client.get_metric_history(run.info.run_id, "step_time_ms") if one.step_times_ms else []
    assert [point.value for point in history] == pytest.approx(one.step_times_ms)
    assert {"cell.json", "config.yaml"} <= files
    assert ("worker.log" in files) == bool(one.step_times_ms)


# Many at once


def test_eight_sweeps_at_once_make_one_sqlite_store(start: Start, tmp_path: Path) -> None:
    """None of them finds the file, so each would make its tables and its experiment."""
    sweeps = [start(database(tmp_path), *TWO_CELLS) for _ in range(8)]
    for sweep in sweeps:
        assert_quiet(sweep.end(PATIENCE_S))
    assert [len(sweep.records()) for sweep in sweeps] == [2] * 8
    assert_each_once(database(tmp_path), *(sweep.folder / "records" for sweep in sweeps))


OPENS = """
import sys, time
from pathlib import Path
from mlflow.tracking import MlflowClient  # what takes seconds is done before the race begins
import mlflow.store.tracking.sqlalchemy_store
from registry.record import Record
from registry.registration import Registration
from registry.schema import TrackingConfig
from registry.tracking import Tracker
uri, ready, go = sys.argv[1:]
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.001)
Tracker(TrackingConfig("local", uri, "rfloor", None))
"""


@pytest.mark.parametrize("attempt", range(3))
def test_eight_that_make_one_sqlite_store_in_the_same_moment(tmp_path: Path, attempt: int) -> None:
    """Each with a folder of its own for temporary files, and half of them under another name for the same file."""
    (tmp_path / "link").symlink_to(tmp_path)
    openers = []
    for number in range(8):
        (tmp_path / f"tmp{number}").mkdir()
        home = tmp_path / "link" if number % 2 else tmp_path
        openers.append(
            subprocess.Popen(
                [sys.executable, "-c", OPENS, database(home), str(tmp_path / f"ready{number}"), str(tmp_path / "go")],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / f"tmp{number}")},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    wait_for(lambda: len([*tmp_path.glob("ready*")]) == 8, "not all are ready")
    (tmp_path / "go").touch()
    told = [opener.communicate(timeout=PATIENCE_S)[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0] * 8, told
    assert told == [""] * 8
    assert_each_once(database(tmp_path))


def test_importers_of_the_same_records_share_the_work(importer: Import, composer: Composer, tmp_path: Path) -> None:
    """Four at once, of which one sees the records from further up."""
    folder = prepare(tmp_path / "records" / "below", composer, 30)
    Tracker(TrackingConfig("local", database(tmp_path), "rfloor", str(tmp_path / "artifacts")))
    folders = [folder, folder, folder, tmp_path / "records"]
    importers = [importer(database(tmp_path), one) for one in folders]
    for one in importers:
        assert_quiet(one.end())
        assert one.counts.total() == 30
    assert sum(one.counts["imported"] for one in importers) == 30
    assert_each_once(database(tmp_path), folder)


def test_imports_while_a_sweep_goes_on_leave_it_its_runs(importer: Import, start: Start, tmp_path: Path) -> None:
    """Whatever of the sweep an import comes upon, its run is there: it is completed, and no other is made."""
    # An experiment whose cells no CPU can run, so that they end as fast as MLflow takes them.
    sweep = start(database(tmp_path), "experiment=graphs_ab", "protocol.sessions=8", "quant=exl2", *SMALL)
    wait_for(lambda: sweep.written(), "no record")
    importers = []
    for _ in range(4):
        importers.append(importer(database(tmp_path), sweep.folder / "records"))
        time.sleep(2)
    assert_quiet(sweep.end())
    for one in importers:
        assert_quiet(one.end())
    assert_each_once(database(tmp_path), sweep.folder / "records")


@pytest.mark.parametrize("served", [2], indirect=True, ids=["two workers"])
def test_sixteen_writers_share_a_server(
    served: Server, importer: Import, start: Start, composer: Composer, tmp_path: Path
) -> None:
    """As many sweeps, and beside them two folders of old records that two processes each import.

    Four of the sweeps measure: sixteen workers at once want more memory than many a machine has.
    """
    folders = [prepare(tmp_path / f"old{number}" / "records", composer, 5) for number in range(2)]
    cells = [TWO_CELLS] * 4 + [("execution=cuda_graph", "protocol.seed=1,2")] * 12
    sweeps = [start(served.url, *own) for own in cells]
    importers = [importer(served.url, folder) for folder in [*folders, *folders]]
    for ended in [one.end() for one in importers] + [sweep.end(PATIENCE_S) for sweep in sweeps]:
        assert_quiet(ended)
    assert [len(sweep.records()) for sweep in sweeps] == [2] * 16
    assert sum((one.counts for one in importers), Counter())["imported"] == 10
    assert_each_once(served.url, *folders, *(sweep.folder / "records" for sweep in sweeps))


# A store that goes away


def measuring(sweep: Sweep, cells: int = 1) -> bool:
    """Whether its worker is at work on this cell, whose run is then open."""
    return len([*sweep.folder.glob("records/*/*.log")]) == cells


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Keep the SQLite store from everybody else."""
    holder = sqlite3.connect(home / "mlflow.db", timeout=60, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.rollback()
        holder.close()


def assert_told_once(sweep: Sweep, cause: str) -> list[str]:
    """The sweep ended with code 1 and one line that says why, and what to do then: the words of that command."""
    assert sweep.code == 1, sweep.stdout + sweep.stderr
    assert [record["outcome"] for record in sweep.records()] == ["ok", "unsupported"]
    for word in ("Traceback", "WARNING", "ERROR", "Retrying"):
        assert word not in sweep.stdout + sweep.stderr, sweep.stderr
    [told] = re.findall(r"^MLflow did not take every run \((.*?)\)\. Once it does: (.*)$", sweep.stdout, re.MULTILINE)
    assert re.search(cause, told[0]), told
    return shlex.split(told[1])


def rfloor(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that a message named."""
    assert command[0] == "rfloor"
    return subprocess.run(
        [sys.executable, "-m", "registry.cli", *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_sweep_waits_for_whoever_locks_the_store_for_seconds(start: Start, tmp_path: Path) -> None:
    sweep = start(database(tmp_path), *TWO_CELLS)
    wait_for(lambda: measuring(sweep), "no worker")
    with locked(tmp_path):
        wait_for(lambda: sweep.written(), "no record")
        time.sleep(8)
        assert len(sweep.written()) == 1, "it has not waited"
    assert_quiet(sweep.end())
    assert_each_once(database(tmp_path), sweep.folder / "records")


def test_a_store_that_stays_locked_is_told_and_completed_later(start: Start, tmp_path: Path) -> None:
    sweep = start(database(tmp_path), *TWO_CELLS)
    wait_for(lambda: measuring(sweep), "no worker")
    with locked(tmp_path):
        wait_for(lambda: sweep.written(), "no record")
        clock = time.monotonic()
        sweep.end()
        assert time.monotonic() - clock < HELD_UP_S
        command = assert_told_once(sweep, rf"another process has kept {tmp_path}/mlflow\.db locked for \d+ s")
        started = time.monotonic()
        late = rfloor(command)
        assert time.monotonic() - started < HELD_UP_S
        assert (late.returncode, late.stdout) == (1, "")
        assert re.fullmatch(r"rfloor: MLflow cannot be reached: another process has kept .* locked .*\n", late.stderr)
    done = rfloor(command)
    assert (done.returncode, done.stdout) == (0, "1 imported, 1 completed, 0 present\n"), done.stderr
    assert_each_once(database(tmp_path), sweep.folder / "records")


def test_a_store_that_is_locked_from_the_beginning_costs_no_measurement(start: Start, tmp_path: Path) -> None:
    MlflowClient(database(tmp_path)).search_experiments()
    with locked(tmp_path):
        sweep = start(database(tmp_path), *TWO_CELLS)
        sweep.end()
        command = assert_told_once(sweep, "another process has kept")
    done = rfloor(command)
    assert (done.returncode, done.stdout) == (0, "2 imported, 0 completed, 0 present\n"), done.stderr
    assert_each_once(database(tmp_path), sweep.folder / "records")


GONE: dict[str, tuple[Callable[[Server, Cluster], Any], Callable[[Server, Cluster], Any]]] = {
    "server killed": (lambda server, _: server.stop(), lambda server, _: server.start()),
    "server hangs": (
        lambda server, _: server.signal(signal.SIGSTOP),
        lambda server, _: server.signal(signal.SIGCONT),
    ),
    "database stopped": (lambda _, postgresql: postgresql.stop(), lambda _, postgresql: postgresql.start()),
}


@pytest.mark.parametrize("what", GONE)
def test_a_server_that_goes_away_is_told_and_completed_later(
    served: Server, postgresql: Cluster, start: Start, what: str
) -> None:
    """Within seconds, whichever part of it has gone, and with nothing lost."""
    go_away, come_back = GONE[what]
    sweep = start(served.url, *TWO_CELLS)
    wait_for(lambda: measuring(sweep), "no worker")
    go_away(served, postgresql)
    try:
        wait_for(lambda: sweep.written(), "no record")
        clock = time.monotonic()
        sweep.end()
        held_up = time.monotonic() - clock
        command = assert_told_once(sweep, r"\S")
        assert held_up < HELD_UP_S
        clock = time.monotonic()
        late = rfloor(command)
        assert (late.returncode, late.stdout) == (1, "")
        assert re.fullmatch(r"rfloor: MLflow cannot be reached: .*\n", late.stderr)
        assert time.monotonic() - clock < HELD_UP_S
    finally:
        come_back(served, postgresql)
    done = rfloor(command)
    assert (done.returncode, done.stdout) == (0, "1 imported, 1 completed, 0 present\n"), done.stderr
    assert rfloor(command).stdout == "0 imported, 0 completed, 2 present\n"
    assert_each_once(served.url, sweep.folder / "records")


def test_a_sweep_sits_out_a_server_s_restart(served: Server, postgresql: Cluster, start: Start) -> None:
    sweep = start(served.url, *TWO_CELLS)
    wait_for(lambda: measuring(sweep), "no worker")
    postgresql.stop()
    wait_for(lambda: sweep.written(), "no record")
    time.sleep(3)
    postgresql.start()
    assert_quiet(sweep.end())
    assert_each_once(served.url, sweep.folder / "records")


def test_a_database_that_is_down_is_told_within_seconds(
    postgresql: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a server between."""
    uri = postgresql.database("reached_directly")
    postgresql.stop()
    try:
        clock = time.monotonic()
        with pytest.raises(TrackingDown, match=r"connection to server on socket .* failed"):
            Tracker(TrackingConfig("server", uri, "rfloor"))
        assert time.monotonic() - clock < HELD_UP_S
        assert [record for record in caplog.records if record.name.startswith("mlflow")] == []
    finally:
        postgresql.start()

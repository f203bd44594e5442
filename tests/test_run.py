"""Whole sweeps as real processes: plugins that misbehave, signals, and what is left behind.

Each sweep runs once and is shared by the tests that look at it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

# sqlalchemy about what MLflow does
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "tests" / "faults"
BENIGN = ("ok", "oom", "unsupported")
PATIENCE_S = 120  # for what takes seconds on an idle machine


@dataclass
class Sweep:
    """One call of runner.py, and all that came of it."""

    home: Path
    mark: str
    process: subprocess.Popen[str]
    stdout: str = ""
    stderr: str = ""
    code: int | None = None
    left_processes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.home / self.mark

    def end(self) -> "Sweep":
        self.stdout, self.stderr = self.process.communicate(timeout=PATIENCE_S)
        self.code = self.process.returncode
        self.left_processes = [command for _, command in marked(self.mark)]
        return self

    def records(self) -> list[dict[str, Any]]:
        """Every record, in the order of the cells."""
        found = [json.loads(file.read_text()) for file in self.folder.glob("records/*/*.json")]
        return sorted(found, key=lambda record: record["index"])

    def record(self, backend: str, execution: str = "eager") -> dict[str, Any]:
        names = [(r["config"]["backend"]["name"], r["config"]["execution"]["name"]) for r in self.records()]
        assert names.count((backend, execution)) == 1, f"{names} in {self.stderr}"
        return self.records()[names.index((backend, execution))]

    def log(self, record: dict[str, Any]) -> str:
        [log] = self.folder.glob(f"records/{record['cell_id']}/{record['sweep_id']}-{record['index']}.log")
        return log.read_text()

    def row(self, record: dict[str, Any]) -> str:
        """The cell's row in the table."""
        [row] = re.findall(rf"^ *{record['index'] + 1} +\S.*$", self.stdout, re.MULTILINE)
        return str(row)

    def note(self, record: dict[str, Any]) -> str:
        """The line below the table that tells of this cell alone."""
        start = rf"#{record['index'] + 1} {record['outcome']}: "
        [note] = re.findall(rf"^{start}.*(?:\n(?!#|Compare).*)*", self.stdout, re.MULTILINE)
        return words(note)

    def runs(self) -> dict[str, Run]:
        """The sweep's MLflow runs, by the record that they are of."""
        client = MlflowClient(database(self.home))
        experiment = client.get_experiment_by_name("rfloor")
        if experiment is None:
            return {}
        [sweep_id] = {record["sweep_id"] for record in self.records()}
        found = client.search_runs([experiment.experiment_id], f"tags.sweep_id = '{sweep_id}'")
        by_record = {run.data.tags["rfloor.record_id"]: run for run in found}
        assert len(by_record) == len(found)
        return by_record


def database(home: Path) -> str:
    return f"sqlite:///{home}/mlflow.db"


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Living processes with the mark of a sweep in their environment, which every descendant inherits."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                yield int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")


def wait_for(what: Callable[[], object], told: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


Start = Callable[..., Sweep]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a sweep over the tiny model, whose every file goes to a folder of its own; all share one MLflow."""
    home = tmp_path_factory.mktemp("sweeps")
    started: list[Sweep] = []

    def start(*overrides: str) -> Sweep:
        mark = f"sweep-{uuid.uuid4().hex}"
        folder = home / mark
        for name in ("cwd", "tmp"):
            (folder / name).mkdir(parents=True)
        tracking = [f"tracking.uri={database(home)}", f"tracking.artifacts={home}/artifacts"]
        fixed = ["model=tiny", "gpu=cpu", "context=32", "protocol.threads=1", f"records={folder}/records", *tracking]
        path = os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "runner.py"), "-m", *fixed, *overrides],
            cwd=folder / "cwd",
            env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "RFLOOR_TEST_MARK": mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Sweep(home, mark, process))
        return started[-1]

    yield start
    for sweep in started:
        for pid, _ in marked(sweep.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sweep.process.wait()
    shutil.rmtree(home)


def words(text: str) -> str:
    return " ".join(text.split())


def assert_told(sweep: Sweep, record: dict[str, Any], outcome: str, reason: str, remedy: str) -> None:
    """The cell's outcome, reason and remedy are in its record and in what was printed."""
    assert record["outcome"] == outcome, record["reason"]
    assert re.search(reason, record["reason"])
    assert re.search(remedy, record["remedy"]) if remedy else not record["remedy"]
    assert outcome in sweep.row(record).split()
    assert f"{outcome} {record['label']}" in words(sweep.stderr)
    if record["reason"]:
        note = sweep.note(record)
        assert words(record["reason"]) in note
        assert words(record["remedy"]) in note


def assert_logged(sweep: Sweep, record: dict[str, Any]) -> None:
    """The cell has a run of its own in MLflow, ended as its outcome says, with its record and log."""
    run = sweep.runs()[record["record_id"]]
    assert run.data.tags["cell_id"] == record["cell_id"]
    statuses = dict.fromkeys(BENIGN, "FINISHED") | {"interrupted": "KILLED"}
    assert run.info.status == statuses.get(record["outcome"], "FAILED")
    assert run.data.tags["outcome"] == record["outcome"]
    assert run.data.tags.get("reason", "") == record["reason"]
    files = {file.path for file in MlflowClient(database(sweep.home)).list_artifacts(run.info.run_id)}
    asked = (sweep.folder / "records" / record["cell_id"] / f"{record['sweep_id']}-{record['index']}.log").exists()
    assert files == {"cell.json", "config.yaml"} | ({"worker.log"} if asked else set())


def assert_nothing_left(sweep: Sweep) -> None:
    """No process, no temporary file, nothing where the call was made."""
    assert sweep.left_processes == []
    kept = "torchinductor_"  # PyTorch's own cache, which it makes on import
    assert [file for file in (sweep.folder / "tmp").iterdir() if not file.name.startswith(kept)] == []
    assert list((sweep.folder / "cwd").iterdir()) == []
    files = list(sweep.folder.glob("records/*/*"))
    assert {file.suffix for file in files} <= {".json", ".log"}
    assert not [file for file in files if file.name.startswith(".")]
    assert "Traceback" not in sweep.stdout + sweep.stderr


# Every fault is its own cell's outcome

FAULTY = {
    "raises": (
        "crash",
        r"^ValueError: broken on purpose \[/no/tag\] \[red\]text\[/\] \\udcff (on and on ){50}.{,900}\.\.\.$",
        "",
    ),
    "killed": ("crash", r"killed by SIGKILL .*memory", r"^See \S+\.log$"),
    "segfaults": ("crash", r"killed by SIGSEGV; it was in File .*rfloor_faults\.py.* in load$", r"^See \S+\.log$"),
    "leaves": ("crash", r"ended with code 0 and no answer; its last words: (last words ?){20}", ""),
    "needs": (
        "missing_dependency",
        r"^no-such-package-anywhere is not installed$",
        "^pip install no-such-package-anywhere$",
    ),
    "miscounts": ("crash", "^what the worker answered makes no record: TypeError: .*NoneType", ""),
    "wrong": ("incorrect", r"logits reach a cosine of -?0\.\d+ with plain transformers", ""),
    "noisy": ("ok", "^$", ""),
}


@pytest.fixture(scope="module")
def faulty(start: Start) -> Sweep:
    return start(f"backend={','.join(FAULTY)}").end()


@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_is_one_cell_s_outcome(faulty: Sweep, fault: str) -> None:
    assert_told(faulty, faulty.record(fault), *FAULTY[fault])


@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_is_a_run(faulty: Sweep, fault: str) -> None:
    assert_logged(faulty, faulty.record(fault))


def test_faults_end_a_sweep_with_1_and_leave_nothing_behind(faulty: Sweep) -> None:
    assert faulty.code == 1, faulty.stderr
    assert [record["config"]["backend"]["name"] for record in faulty.records()] == list(FAULTY)
    assert len(faulty.runs()) == len(FAULTY)
    assert_nothing_left(faulty)


def test_what_a_worker_printed_is_kept(faulty: Sweep) -> None:
    assert "x" * 5_000_000 in faulty.log(faulty.record("noisy"))
    traceback = faulty.log(faulty.record("raises"))
    assert "the second line" in traceback
    assert re.search(r"rfloor_faults\.py.* in load", traceback)


def test_what_is_right_among_faults_is_measured(faulty: Sweep) -> None:
    record = faulty.record("noisy")
    assert len(record["step_times_ms"]) == record["config"]["protocol"]["measured_steps"] == 30
    assert record["metrics"]["logit_cosine"] > 0.999
    run = faulty.runs()[record["record_id"]]
    assert run.data.metrics["median_tpot_ms"] == record["p50_ms"] == record["metrics"]["median_tpot_ms"]
    assert f"{record['p50_ms']:.2f}" in faulty.row(record).split()


# A sweep whose machine only said no

ANSWERED = {
    ("refuses", "eager"): ("unsupported", "^the model has too few layers$", "^Use one with more$"),
    ("refuses", "cuda_graph"): ("unsupported", "'refuses' cannot be launched by execution=cuda_graph", "eager"),
    ("exhausts", "eager"): ("oom", "allocate", ""),
    ("exhausts", "cuda_graph"): ("unsupported", "'exhausts' cannot be launched by execution=cuda_graph", "eager"),
    ("hf", "eager"): ("ok", "^$", ""),
    ("hf", "cuda_graph"): ("unsupported", "cuda_graph needs a CUDA device", "^Use execution=eager$"),
}


@pytest.fixture(scope="module")
def answered(start: Start) -> Sweep:
    return start("backend=refuses,exhausts,hf", "execution=eager,cuda_graph").end()


@pytest.mark.parametrize("cell", ANSWERED, ids="-".join)
def test_no_is_an_answer(answered: Sweep, cell: tuple[str, str]) -> None:
    record = answered.record(*cell)
    assert_told(answered, record, *ANSWERED[cell])
    assert_logged(answered, record)


def test_a_sweep_of_answers_exits_with_0(answered: Sweep) -> None:
    assert answered.code == 0, answered.stderr
    assert len(answered.records()) == len(answered.runs()) == len(ANSWERED)
    assert_nothing_left(answered)


def test_an_axis_s_own_options_hold_for_each_of_its_cells(start: Start) -> None:
    """Hydra alone would look for them beside the default, which has none, before it sees the axis."""
    sweep = start("backend=refuses", "quant=nf4,nf4", "quant.options.block_size=128").end()
    assert sweep.code == 0, sweep.stderr
    found = [(record["outcome"], record["config"]["quant"]["options"]) for record in sweep.records()]
    assert found == [("unsupported", {"block_size": 128})] * 2


# Hanging, and signals


def hangs(sweep: Sweep, log: str) -> bool:
    """Whether a cell hangs by now, told by what it prints into its log."""
    assert sweep.process.poll() is None, sweep.process.communicate()
    return any("hanging now" in file.read_text() for file in sweep.folder.glob(f"records/*/{log}"))


def assert_interrupted(sweep: Sweep, first: int) -> None:
    """From this cell on every one ended as interrupted, and so did the sweep."""
    hanging, *rest = sweep.records()[first:]
    assert {record["outcome"] for record in (hanging, *rest)} == {"interrupted"}
    assert hanging["reason"] == "interrupted by the user"
    assert {record["reason"] for record in rest} <= {"the sweep was interrupted before this cell"}
    for record in (hanging, *rest):
        assert "interrupted" in sweep.row(record).split()
        assert_logged(sweep, record)
    assert sweep.code == 1, sweep.stderr
    assert_nothing_left(sweep)


def test_an_interrupted_sweep_loses_no_cell(start: Start) -> None:
    sweep = start("backend=hangs-in-step,hf,needs")
    wait_for(lambda: hangs(sweep, "*-0.log"), "the first cell does not hang")
    sweep.process.send_signal(signal.SIGINT)
    assert_interrupted(sweep.end(), first=0)
    assert len(sweep.records()) == len(sweep.runs()) == 3


def test_an_interrupt_between_workers_waits_for_what_is_being_written(start: Start) -> None:
    sweep = start("backend=needs", "protocol.seed=range(0,12)")
    wait_for(lambda: list(sweep.folder.glob("records/*/*.json")) or sweep.process.poll(), "no cell ends")
    for _ in range(3):  # as an impatient user does it
        sweep.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    sweep.end()
    outcomes = [record["outcome"] for record in sweep.records()]
    missing = outcomes.count("missing_dependency")
    assert outcomes == ["missing_dependency"] * missing + ["interrupted"] * (12 - missing)
    assert 0 < missing < 12
    for record in sweep.records():
        assert_logged(sweep, record)
    assert sweep.code == 1
    assert_nothing_left(sweep)


@pytest.fixture(scope="module")
def hung(start: Start, faulty: Sweep) -> Sweep:
    """Two cells that hang: the first until its time is over, the second until the sweep is asked to end.

    The time is more than a worker needed here that got as far.
    """
    timeout_s = 3 + round(2 * faulty.record("raises")["wall_s"])
    sweep = start("backend=hangs", f"protocol.timeout_s={timeout_s},1800")
    wait_for(lambda: hangs(sweep, "*-1.log"), "the second cell does not hang")
    sweep.process.send_signal(signal.SIGTERM)
    return sweep.end()


def test_a_hanging_cell_is_ended_in_time_and_the_sweep_goes_on(hung: Sweep) -> None:
    record = hung.records()[0]
    timeout_s = record["config"]["protocol"]["timeout_s"]
    assert_told(hung, record, "timeout", f"^not done after {timeout_s:g} s$", r"protocol\.timeout_s=")
    assert_logged(hung, record)
    assert "hanging now" in hung.log(record)
    assert timeout_s <= record["wall_s"] < timeout_s + 5


def test_a_sweep_that_is_asked_to_end_loses_no_cell(hung: Sweep) -> None:
    assert_interrupted(hung, first=1)
    assert len(hung.records()) == len(hung.runs()) == 2


def test_a_worker_dies_with_its_parent(start: Start) -> None:
    sweep = start("backend=hangs")
    wait_for(lambda: hangs(sweep, "*-0.log"), "the cell does not hang")
    [worker] = [pid for pid, command in marked(sweep.mark) if "registry.worker" in command]
    sweep.process.kill()
    sweep.process.communicate(timeout=PATIENCE_S)
    wait_for(lambda: worker not in dict(marked(sweep.mark)), "the worker lives on")

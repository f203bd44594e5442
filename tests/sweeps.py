"""Whole sweeps as real processes, and what to look at once they have ended."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.cache import KERNELS

if TYPE_CHECKING:
    from mlflow.entities import Run


ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "tests" / "faults"
BENIGN = ("ok", "oom", "unsupported")
PATIENCE_S = 240


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

    def end(self, patience_s: float = PATIENCE_S) -> "Sweep":
        printed = self.process.communicate(timeout=patience_s)
        self.stdout, self.stderr = (text or "" for text in printed)  # of one that prints elsewhere nothing is known
        self.code = self.process.returncode
        self.left_processes = [command for _, command in marked(self.mark)]
        return self

    def kill(self) -> None:
        """End it and all that it started, wherever it stands."""
        with self.process:
            for pid, _ in marked(self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def until_it_hangs(self, cell: str = "*") -> None:
        """Wait until a worker prints that it hangs, that of the cell with this index or any."""
        wait_for(lambda: self._hangs(cell), f"cell {cell} does not hang")

    def _hangs(self, cell: str) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        logs = self.folder.glob(f"records/*/*-{cell}.log")  # hidden, until its worker ends
        return any("hanging now" in log.read_text() for log in logs)

    def written(self) -> list[Path]:
        """The files of its records so far."""
        return [*self.folder.glob(f"records/{'[0-9a-f]' * 16}/*.json")]

    def records(self) -> list[dict[str, Any]]:
        """Every record, in the order of the cells."""
        found = [json.loads(file.read_text()) for file in self.written()]
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

    def runs(self) -> "dict[str, Run]":
        """The sweep's MLflow runs, by the record that they are of."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(database(self.home))
        experiment = client.get_experiment_by_name("rfloor")
        if experiment is None:
            return {}
        [sweep_id] = {record["sweep_id"] for record in self.records()}
        found = client.search_runs([experiment.experiment_id], f"tags.sweep_id = '{sweep_id}'")
        by_record = {run.data.tags["rfloor.record_id"]: run for run in found}
        assert len(by_record) == len(found)
        return by_record


def launch(
    home: Path,
    tracking: Sequence[str],
    *overrides: str,
    after: Sweep | None = None,
    output: int = subprocess.PIPE,
) -> Sweep:
    """Start a sweep over the tiny model, whose every file but MLflow's goes to a folder under `home`.

    The folder is its own, or that of a sweep that was there before. What the overrides say themselves goes before
    the model, device and context that a sweep has otherwise. It prints to `output`.
    """
    mark = after.mark if after else f"sweep-{uuid.uuid4().hex}"
    folder = home / mark
    for name in ("cwd", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=after is not None)
    kept = [f"records={folder}/records", f"cache.folder={folder}/cache"]
    given = {override.partition("=")[0] for override in overrides}
    usual = {"model": "tiny", "gpu": "cpu", "context": "32", "protocol.threads": "1"}
    fixed = [*(f"{key}={value}" for key, value in usual.items() if key not in given), *kept, *tracking]
    path = os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH")]))
    # Inductor, once it has compiled in this process, says here where it keeps what it makes.
    inherited = {name: value for name, value in os.environ.items() if name not in KERNELS}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "runner.py"), "-m", *fixed, *overrides],
        cwd=folder / "cwd",
        env=inherited | {"PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "RFLOOR_TEST_MARK": mark},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        text=True,
    )
    return Sweep(home, mark, process)


def database(home: Path) -> str:
    return f"sqlite:///{home}/mlflow.db"


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Living processes with the mark of a sweep in their environment, which descendants inherit, or their command."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if mark.encode() in (entry / "environ").read_bytes() + command:
                yield int(entry.name), command.decode(errors="replace").replace("\0", " ")


def wait_for(what: Callable[[], object], told: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


Start = Callable[..., Sweep]


def words(text: str) -> str:
    return " ".join(text.split())


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that bad input is answered with."""
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("rfloor: ")
    return line


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
    from mlflow.tracking import MlflowClient

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
    kept = "torchinductor_"  # PyTorch's own cache, whose precompiled headers go nowhere else
    assert [file for file in (sweep.folder / "tmp").iterdir() if not file.name.startswith(kept)] == []
    assert list((sweep.folder / "cwd").iterdir()) == []
    files = list(sweep.folder.glob("records/*/*"))
    assert {file.suffix for file in files} <= {".json", ".log"}
    assert not [file for file in files if file.name.startswith(".")]
    assert "Traceback" not in sweep.stdout + sweep.stderr

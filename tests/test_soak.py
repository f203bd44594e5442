"""A long sweep: the process that runs it stays as small and as quick as it began, and leaves nothing.

`make soak`; RFLOOR_SOAK_CELLS=20 makes it a short one.
"""

import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sweeps import Start, Sweep, assert_nothing_left

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated"),  # sqlalchemy on MLflow
]
CELLS = int(os.environ.get("RFLOOR_SOAK_CELLS", "500"))
SETTLED = 3
"""The cell from which on nothing may grow: the first two bring in what is imported when it is used."""
GROWTH_MB = 4.0
"""A fifth of what would be bearable: a cell leaves a kB or two behind; the allocator takes its room in steps."""
OVERHEAD_S = 0.5
LOOK_S = 0.02
A_CELL_S = 60
"""What nobody waits for longer than: a cell takes seconds."""
WORKER = b"registry.worker"


@dataclass
class Watch:
    """What was seen of a sweep's process from outside.

    Attributes:
        own_mb: Largest resident memory of its own while each worker lived, by its cell, from 1; what is mapped from
            files comes and goes as others need room.
        descriptors: Fewest open files meanwhile.
        idle_s: Seconds without a worker, since the first ended.
        cpu_s: Seconds that the process itself has computed for by the end of each worker.
        workers: How many there were.
    """

    own_mb: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    descriptors: dict[int, int] = field(default_factory=lambda: defaultdict(lambda: 1 << 30))
    idle_s: float = 0.0
    cpu_s: dict[int, float] = field(default_factory=dict)
    workers: int = 0

    def look(self, pid: int) -> None:
        """Look until the process ends.

        A worker's own work is the life of its process: the interpreter's start, imports, and what is measured. The
        overhead is the rest, when there is none: a record is begun and written, MLflow gets a run, the next worker
        is started; and once a sweep the table. It is looked at some fifty times a second.
        """
        process, before, last = Path(f"/proc/{pid}"), time.monotonic(), ""
        while (seen := _status(process)) is not None:
            now = time.monotonic()
            worker = _worker(process)
            if worker and worker != last:
                self.workers, last = self.workers + 1, worker
            elif not worker and self.workers:
                self.idle_s += now - before
            if worker:
                self.cpu_s[self.workers] = _cpu_s(process)
                self.own_mb[self.workers] = max(self.own_mb[self.workers], seen)
                self.descriptors[self.workers] = min(self.descriptors[self.workers], _descriptors(process))
            before = now
            time.sleep(LOOK_S)


def _status(process: Path) -> float | None:
    """Resident memory that is no file's, in MB; `None` once the process has ended."""
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), None)


def _cpu_s(process: Path) -> float:
    """Seconds in user and system mode (proc(5), stat's fields 14 and 15), without those of its children."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _worker(process: Path) -> str:
    """The worker that lives now; empty where there is none."""
    try:
        keepers = [pid for pid in _children(process) if WORKER in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return next((worker for pid in keepers for worker in _children(Path(f"/proc/{pid}"))), "")
    except OSError:
        return ""


def _children(process: Path) -> list[str]:
    return (process / "task" / process.name / "children").read_text().split()


def _descriptors(process: Path) -> int:
    try:
        return len(list((process / "fd").iterdir()))
    except OSError:
        return 1 << 30


@pytest.fixture(scope="module")
def watched(start: Start) -> tuple[Sweep, Watch]:
    sweep, watch = start(f"protocol.seed=range(0,{CELLS})"), Watch()
    watching = threading.Thread(target=watch.look, args=(sweep.process.pid,), daemon=True)
    watching.start()
    sweep.end(CELLS * A_CELL_S)
    watching.join()
    return sweep, watch


@pytest.mark.timeout(CELLS * A_CELL_S + 600)
def test_every_cell_has_one_record_and_one_run(watched: tuple[Sweep, Watch]) -> None:
    sweep, watch = watched
    assert sweep.code == 0, sweep.stderr[-2000:]
    assert [record["index"] for record in sweep.records()] == [*range(CELLS)]
    assert {record["outcome"] for record in sweep.records()} == {"ok"}
    assert len({record["cell_id"] for record in sweep.records()}) == CELLS
    runs = sweep.runs()
    assert runs.keys() == {record["record_id"] for record in sweep.records()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert watch.workers == CELLS


@pytest.mark.timeout(CELLS * A_CELL_S + 600)
def test_nothing_is_left_behind(watched: tuple[Sweep, Watch]) -> None:
    assert_nothing_left(watched[0])


@pytest.mark.timeout(CELLS * A_CELL_S + 600)
def test_the_process_does_not_grow(watched: tuple[Sweep, Watch]) -> None:
    _, watch = watched
    assert watch.own_mb[CELLS] - watch.own_mb[SETTLED] < GROWTH_MB, dict(watch.own_mb)
    assert watch.descriptors[CELLS] <= watch.descriptors[SETTLED], dict(watch.descriptors)


@pytest.mark.timeout(CELLS * A_CELL_S + 600)
def test_a_cell_costs_little_beyond_its_worker(
    watched: tuple[Sweep, Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, watch = watched
    overhead = watch.idle_s / (CELLS - 1)
    own = sum(record["wall_s"] for record in sweep.records()) / CELLS
    computed = (watch.cpu_s[CELLS] - watch.cpu_s[1]) / (CELLS - 1)
    figures = (
        f"{CELLS} cells: {own:.2f} s a record; without a worker {overhead:.3f} s a cell, the parent computes "
        f"{computed:.3f} s; MB at cell {SETTLED} {watch.own_mb[SETTLED]:.1f}, at the end {watch.own_mb[CELLS]:.1f}; "
        f"open files {watch.descriptors[SETTLED]} and {watch.descriptors[CELLS]}"
    )
    with capsys.disabled():
        print(f"\n{figures}")
    assert overhead < OVERHEAD_S, figures

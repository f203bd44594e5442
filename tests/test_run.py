"""Whole sweeps as real processes: plugins that misbehave, signals, and what is left behind.

Each sweep runs once and is shared by the tests that look at it.
"""

import os
import pty
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from planning import CPU, Plan
from sweeps import (
    PATIENCE_S,
    Start,
    Sweep,
    assert_logged,
    assert_nothing_left,
    assert_told,
    marked,
    wait_for,
    words,
)

from registry import child
from registry.cache import KERNELS
from registry.child import _environment
from registry.log_limit import LEFT_OUT, LIMIT

# sqlalchemy about what MLflow does
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")


# Every fault is its own cell's outcome

FAULTY = {
    "raises": (
        "crash",
        r"^ValueError: broken on purpose \[/no/tag\] \[red\]text\[/\] \\udcff (on and on ){50}.{,900}\.\.\.$",
        "",
    ),
    "killed": ("crash", r"killed by SIGKILL .*memory", r"^See \S+\.log$"),
    "segfaults": ("crash", r"killed by SIGSEGV; it was in File .*rfloor_faults\.py.* in load$", r"^See \S+\.log$"),
    "leaves": ("crash", r"ended with code 0 and no answer; its last words: (last words ?){20}", r"^See \S+\.log$"),
    "needs": (
        "missing_dependency",
        r"^no-such-package-anywhere is not installed$",
        "^pip install no-such-package-anywhere$",
    ),
    "fails-to-build": (
        "missing_dependency",
        r'^a fast extension cannot be compiled: fast\.cu\(7\): error: identifier "half2" is undefined$',
        "",
    ),
    "falls-back": (
        "unsupported",
        r"^backend=falls-back asked for a kernel like '\^fast_kernel', and none ran; the step launched .*aten::mm",
        "",
    ),
    "miscounts": ("crash", "^what the worker answered makes no record: TypeError: .*NoneType", ""),
    "wrong": ("incorrect", r"logits reach a cosine of -?0\.\d+ with plain transformers", ""),
    "limited": ("oom", "allocate", ""),
    "forks": ("ok", "^$", ""),
    "noisy": ("ok", "^$", ""),
    "floods": (
        "crash",
        r"ended with code 3 and no answer; its last words: the last of many lines, \d\d? MiB$",
        r"^See \S+\.log$",
    ),
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


def test_a_log_does_not_fill_the_disk(faulty: Sweep) -> None:
    """Neither while it is written, which its worker looks at, nor once it is kept."""
    log = faulty.log(faulty.record("floods"))
    assert len(log) <= LIMIT
    assert "the first of many lines" in log[:1000]
    assert "the last of many lines" in log[-1000:]
    assert int(re.search(r"(\d+) MiB$", log.strip())[1]) << 20 <= LIMIT
    assert log.count(LEFT_OUT.decode()) == 1


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
    assert found == [("unsupported", {"block_size": 128, "levels": "nf4", "double_quant": False})] * 2


# A compiled step


@pytest.fixture(scope="module")
def compiled(start: Start) -> Sweep:
    return start("execution=compile", "model.layers=1").end()


def test_a_compiled_step_is_measured(compiled: Sweep) -> None:
    record = compiled.record("hf", "compile")
    assert_told(compiled, record, "ok", "", "")
    assert_logged(compiled, record)
    assert record["config"]["execution"] == {
        "name": "compile",
        "launch": "compile",
        "cache": "static",
        "mode": "default",
    }
    execution = record["measured"]["execution"]
    assert (execution["compiled_graphs"], execution["graph_breaks"], execution["recompilations"]) == (1, 0, 0)
    assert execution["proof_correlation"] > 0.999
    assert not [warning for warning in record["warnings"] if "compil" in warning]
    assert compiled.runs()[record["record_id"]].data.metrics["compile_s"] == execution["compile_s"] > 0


def test_a_compilation_is_announced_and_kept(compiled: Sweep) -> None:
    assert "build compiled step (default, kept; minutes the first time)" in words(compiled.stderr)
    assert list(compiled.folder.glob("cache/python*-torch*/inductor/fxgraph/*"))
    assert_nothing_left(compiled)


def test_no_compiler_is_a_missing_dependency(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    sweep = start("execution=compile", "model.layers=1").end()
    record = sweep.record("hf", "compile")
    assert_told(
        sweep,
        record,
        "missing_dependency",
        r"^torch\.compile lacks a compiler: No working C\+\+ compiler found .*/no/such/compiler",
        r"^Install g\+\+, or name a C\+\+ compiler in CXX$",
    )
    assert "Traceback" in sweep.log(record)
    assert_nothing_left(sweep)


def test_compilers_keep_what_they_make_in_the_cache_unless_told_otherwise(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = plan("model=tiny", f"cache.folder={tmp_path}", "gpu=cpu", "execution=compile", device=CPU)
    for name in KERNELS:
        monkeypatch.delenv(name, raising=False)
    found = _environment(cell)
    root = tmp_path / f"python{cell.versions['python']}-torch{cell.versions['torch']}"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(root / "inductor")
    assert found["TRITON_CACHE_DIR"] == str(root / "triton")
    assert len({found[name] for name in KERNELS}) == len(KERNELS)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert _environment(cell)["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


# Hanging, and signals


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
    sweep.until_it_hangs("0")
    sweep.process.send_signal(signal.SIGINT)
    assert_interrupted(sweep.end(), first=0)
    assert len(sweep.records()) == len(sweep.runs()) == 3


def test_an_interrupt_between_workers_waits_for_what_is_being_written(start: Start) -> None:
    sweep = start("backend=needs", "protocol.seed=range(0,12)")
    wait_for(lambda: sweep.written() or sweep.process.poll(), "no cell ends")
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


def test_a_hang_while_something_is_built_or_stepped_is_ended_in_time(start: Start, faulty: Sweep) -> None:
    timeout_s = 4 + round(2 * faulty.record("noisy")["wall_s"])
    sweep = start("backend=hangs-in-build,hangs-in-step", f"protocol.timeout_s={timeout_s}").end()
    for record in sweep.records():
        assert (record["outcome"], record["reason"]) == ("timeout", f"not done after {timeout_s} s")
        assert "hanging now" in sweep.log(record)
    assert sweep.code == 1
    assert_nothing_left(sweep)


def test_a_compiler_that_hangs_inside_torch_compile_is_ended_in_time(
    start: Start, faulty: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, called = tmp_path / "never-compiles", tmp_path / "called"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\nexec sleep 600 >/dev/null 2>&1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    timeout_s = 12 + round(4 * faulty.record("noisy")["wall_s"])
    sweep = start("execution=compile", "model.layers=1", f"protocol.timeout_s={timeout_s}").end()
    record = sweep.record("hf", "compile")
    assert called.exists()
    assert (record["outcome"], record["reason"]) == ("timeout", f"not done after {timeout_s} s")
    assert sweep.code == 1
    assert_nothing_left(sweep)


def test_a_worker_that_does_not_end_once_it_has_answered_loses_no_measurement(start: Start) -> None:
    sweep = start("backend=lingers,lingers-and-raises", "protocol.timeout_s=100").end()
    for record in sweep.records():
        assert child.LINGERED in record["warnings"]
        assert child.GRACE_S < record["wall_s"] < 100
        assert_logged(sweep, record)
    assert_told(sweep, sweep.record("lingers"), "ok", "^$", "")
    assert len(sweep.record("lingers")["step_times_ms"]) == 30
    assert_told(sweep, sweep.record("lingers-and-raises"), "crash", "^ValueError: broken on purpose", "")
    assert sweep.code == 1
    assert words(f"warning: {child.LINGERED}") in words(sweep.stdout)
    assert_nothing_left(sweep)


@pytest.mark.parametrize("opened", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_a_sweep_that_nobody_reads_any_more_measures_every_cell_once(
    start: Start, opened: Callable[[], tuple[int, int]]
) -> None:
    """As `| head -1` leaves it, or nohup whose terminal is closed; the first cell is being measured."""
    ours, theirs = opened()
    sweep = start("protocol.seed=1,2,3", "protocol.warmup_steps=1", "protocol.measured_steps=3", output=theirs)
    os.close(theirs)
    wait_for(lambda: [*sweep.folder.glob("records/*/.*.log")] or sweep.process.poll(), "no cell begins")
    os.close(ours)
    sweep.end()
    found = [(record["index"], record["outcome"]) for record in sweep.records()]
    assert found == [(0, "ok"), (1, "ok"), (2, "ok")]
    assert len(sweep.runs()) == 3
    for record in sweep.records():
        assert_logged(sweep, record)
    assert sweep.code == 0
    assert_nothing_left(sweep)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with 64 MiB, where this user may make one."""
    found = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {names: name.lstrip("/") for _, names, name in found}
    if "memory" in places:
        group, limit = Path("/sys/fs/cgroup/memory", places["memory"]), "memory.limit_in_bytes"
    else:
        group, limit = Path("/sys/fs/cgroup", places.get("", "")), "memory.max"
    made = group / f"rfloor-{uuid.uuid4().hex}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (made / limit).write_text(str(64 << 20))
    except OSError as error:
        made.rmdir()
        pytest.skip(f"no control group of memory can be made here: {error}")
    yield made
    made.rmdir()


def test_a_worker_that_the_kernel_kills_for_memory_is_oom(
    start: Start, small_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFLOOR_TEST_CGROUP", str(small_group))
    sweep = start("backend=out-of-memory").end()
    [record] = sweep.records()
    assert_told(sweep, record, "oom", "^the kernel killed the worker for want of host memory$", "smaller model")
    assert sweep.code == 0
    assert_nothing_left(sweep)


@pytest.mark.parametrize(("kills", "outcome"), [(8, "oom"), (7, "crash")])
def test_a_kill_is_oom_where_the_kernel_has_counted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, outcome: str
) -> None:
    """Where no control group can be made, of which the skipped test says why."""
    log, counts = tmp_path / "worker.log", tmp_path / "vmstat"
    log.write_text("loading\n")
    monkeypatch.setattr(child, "VMSTAT", counts)
    counts.write_text("pgfault 9\noom_kill 7\n")
    before = child._oom_kills()
    counts.write_text(f"pgfault 9\noom_kill {kills}\n")
    assert child._died(-signal.SIGKILL, log, child._oom_kills() > before)["outcome"] == outcome


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.4])
def test_an_interrupt_before_the_first_cell_is_told_in_a_line(start: Start, after_s: float) -> None:
    """The sweep is planned and has a name; nothing else has happened, or all of it is interrupted."""
    sweep = start("backend=needs", "protocol.seed=range(0,12)")
    wait_for(lambda: [*sweep.folder.glob("records/sweeps/*.json")], "no sweep")
    time.sleep(after_s)
    sweep.process.send_signal(signal.SIGINT)
    sweep.end()
    assert sweep.code == 1
    assert "Traceback" not in sweep.stdout + sweep.stderr
    if not sweep.records():
        assert sweep.stderr.endswith("rfloor: interrupted before anything was measured\n")


@pytest.fixture(scope="module")
def hung(start: Start, faulty: Sweep) -> Sweep:
    """Two cells that hang: the first until its time is over, the second until the sweep is asked to end.

    The time is more than a worker needed here that got as far.
    """
    timeout_s = 3 + round(2 * faulty.record("raises")["wall_s"])
    sweep = start("backend=hangs", f"protocol.timeout_s={timeout_s},1800")
    sweep.until_it_hangs("1")
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


def test_nothing_outlives_a_sweep_that_is_killed(start: Start) -> None:
    """Neither the worker nor what it started, nor who kept watch over them and slept all the while."""
    sweep = start("backend=hangs")
    sweep.until_it_hangs("0")
    wait_for(lambda: [pid for pid, command in marked(sweep.mark) if command.startswith("sleep ")], "it is alone")
    [keeper] = [pid for pid, command in marked(sweep.mark) if "keeper.py" in command]
    woken = wakings(keeper)
    time.sleep(0.5)
    assert wakings(keeper) == woken
    sweep.process.kill()
    sweep.process.communicate(timeout=PATIENCE_S)
    wait_for(lambda: not [*marked(sweep.mark)], f"these live on: {[*marked(sweep.mark)]}")


def wakings(pid: int) -> list[str]:
    """How often a process has been given a processor."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if "ctxt_switches" in line]

"""One GPU, one cell: held by real processes, freed by their death."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from planning import CPU, H200, Plan

from registry import device_lock, run
from registry.call import Call
from registry.device_lock import REFUSE, WAIT, alone_on, holder, path
from registry.outcome import Outcome, Refused

ROOT = Path(__file__).parent.parent
HOLDS = """
import subprocess, sys
from pathlib import Path
from planning import H200
from registry import device_lock
device_lock.FOLDER = Path(sys.argv[1])
with device_lock.alone_on(H200, "wait", print) as held:
    worker = subprocess.Popen(["sleep", "600"], pass_fds=(held,), stdout=subprocess.DEVNULL)
    print(worker.pid, flush=True)
    sys.stdin.read()
"""


TRIES = """
import sys
from pathlib import Path
from planning import H200
from registry import device_lock
from registry.outcome import Refused
device_lock.FOLDER = Path(sys.argv[1])
try:
    with device_lock.alone_on(H200, "refuse", print):
        print("held")
except Refused as refused:
    print(refused)
"""
NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
SEES_CODE = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device_lock, "FOLDER", tmp_path)
    return tmp_path


class Holder:
    """Another sweep: it holds the device, and so does its worker."""

    def __init__(self, folder: Path, *become: str) -> None:
        self.process = subprocess.Popen(
            [*become, sys.executable, "-c", HOLDS, str(folder)],
            env=SEES_CODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.worker = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        with self.process:
            self.kill()
        if self.worker:
            os.kill(self.worker, signal.SIGKILL)
            self.worker = 0


@pytest.fixture
def other(folder: Path) -> Iterator[Holder]:
    holder = Holder(folder)
    yield holder
    holder.end()


def held(on_busy: str = REFUSE) -> bool:
    """Whether somebody else holds the device."""
    try:
        with alone_on(H200, on_busy, lambda _: None):
            return False
    except Refused:
        return True


def test_a_device_is_held_by_one_sweep_at_a_time_and_its_holder_is_named(other: Holder) -> None:
    with pytest.raises(Refused) as caught, alone_on(H200, REFUSE, lambda _: None):
        pytest.fail("held twice")
    refusal = caught.value.refusal
    assert refusal.outcome is Outcome.INTERRUPTED
    user = pwd.getpwuid(os.getuid()).pw_name
    assert refusal.reason.endswith(f"{H200.uuid} is being measured on by process {other.process.pid} (user {user})")
    assert "on_busy=wait" in refusal.remedy


def test_a_killed_sweep_s_worker_keeps_the_device_until_it_ends_too(other: Holder) -> None:
    other.kill()
    assert held()
    os.kill(other.worker, signal.SIGKILL)
    other.worker = 0
    until_it_is_free()


def until_it_is_free() -> None:
    deadline = time.monotonic() + 30
    while held():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_waits_says_for_whom_and_goes_on_once_the_device_is_free(other: Holder) -> None:
    told: list[str] = []

    def stage(text: str) -> None:
        told.append(text)
        threading.Timer(0.3, other.end).start()

    with alone_on(H200, WAIT, stage):
        pass
    assert len(told) == 1
    assert told[0].startswith("wait: ")
    assert f"process {other.process.pid} " in told[0]


def test_another_device_is_another_lock(other: Holder) -> None:
    device = type(H200)(**(vars(H200) | {"uuid": "GPU-2"}))
    with alone_on(device, REFUSE, lambda _: None) as descriptor:
        assert descriptor is not None


def test_a_cpu_is_everybody_s(folder: Path) -> None:
    with alone_on(CPU, REFUSE, lambda _: None) as descriptor:
        assert descriptor is None
    assert not [*folder.iterdir()]


def test_the_file_is_everybody_s_to_open_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        with alone_on(H200, REFUSE, lambda _: None):
            assert path(H200).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_lock_whose_file_was_removed_while_it_was_taken_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cleans /tmp may remove the file between its opening and its lock: the next one would then hold another."""
    taken, seen = device_lock.taken, []

    def late(descriptor: int) -> bool:
        seen.append(os.fstat(descriptor).st_ino)
        if len(seen) == 1:
            path(H200).rename(path(H200).with_suffix(".gone"))
        return taken(descriptor)

    monkeypatch.setattr(device_lock, "taken", late)
    with alone_on(H200, WAIT, lambda _: None) as descriptor:
        assert descriptor is not None
        assert os.fstat(descriptor).st_ino == path(H200).stat().st_ino
    assert len(set(seen)) == 2


def test_a_link_in_the_lock_s_place_is_not_followed(folder: Path) -> None:
    (folder / "else").write_text("mine")
    path(H200).symlink_to(folder / "else")
    with pytest.raises(OSError, match="symbolic links"), alone_on(H200, REFUSE, lambda _: None):
        pytest.fail("followed")


def test_a_machine_that_tells_of_no_locks_has_a_holder_without_a_name(
    other: Holder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_lock, "LOCKS", tmp_path / "none")
    assert holder(path(H200)) == "another process"


# Across users


@pytest.fixture
def everybody_s(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as /tmp is, where this user and nobody may write; both read the code."""
    if os.getuid() != 0 or shutil.which(NOBODY[0]) is None:
        pytest.skip("only root becomes another user")
    if subprocess.run([*NOBODY, sys.executable, "-c", TRIES.partition("\ntry:")[0], "/"], env=SEES_CODE).returncode:
        pytest.skip("another user cannot read the code that is tested")
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o1777)
        monkeypatch.setattr(device_lock, "FOLDER", Path(made))
        yield Path(made)


def tried_by_nobody(folder: Path) -> str:
    tried = subprocess.run([*NOBODY, sys.executable, "-c", TRIES, str(folder)], env=SEES_CODE, capture_output=True)
    assert tried.returncode == 0, tried.stderr
    return tried.stdout.decode()


def test_another_user_holds_a_device_until_its_processes_end(everybody_s: Path) -> None:
    other = Holder(everybody_s, *NOBODY)
    try:
        with pytest.raises(Refused, match=rf"process {other.process.pid} \(user nobody\)"), alone():
            pytest.fail("held twice")
        assert path(H200).owner() == "nobody"
    finally:
        other.end()
    until_it_is_free()
    assert tried_by_nobody(everybody_s) == "held\n"


def test_a_device_is_held_against_another_user_too(everybody_s: Path) -> None:
    with alone():
        assert path(H200).owner() == "root"
        assert f"process {os.getpid()} (user root)" in tried_by_nobody(everybody_s)
    assert tried_by_nobody(everybody_s) == "held\n"


def alone() -> contextlib.AbstractContextManager[int | None]:
    return alone_on(H200, REFUSE, lambda _: None)


# In a sweep


@pytest.fixture
def measured(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a cell of a GPU that this machine has not, with a worker that only says whether the device is held."""

    def ask(cell: Any, file: Path, call: Call, hidden: Any, inherited: tuple[int, ...]) -> dict[str, Any]:
        assert [os.fstat(one).st_ino for one in inherited] == [path(H200).stat().st_ino]
        return {"outcome": Outcome.UNSUPPORTED, "reason": f"held: {held()}"}

    monkeypatch.setattr(run, "ask", ask)

    def run_one(*overrides: str, call: Call | None = None) -> Any:
        cell = plan("model=tiny", "context=64", f"records={tmp_path / 'records'}", *overrides)
        assert cell.device == H200
        return run.run_cell(cell, 0, 0, call or Call("sweep", None, lambda _: None))

    return run_one


def test_a_cell_holds_its_device_while_it_is_measured_and_no_longer(measured: Callable[..., Any]) -> None:
    assert measured().reason == "held: True"
    assert not held()


def test_a_sweep_that_is_not_to_wait_is_interrupted(other: Holder, measured: Callable[..., Any]) -> None:
    call = Call("sweep", None, lambda _: None)
    record = measured("on_busy=refuse", call=call)
    assert record.outcome is Outcome.INTERRUPTED
    assert f"process {other.process.pid} " in record.reason
    assert "resume=true" in record.remedy
    assert call.interrupted


def test_an_interrupt_ends_the_wait(other: Holder, measured: Callable[..., Any]) -> None:
    call = Call("sweep", None, lambda _: None)
    call.stage = lambda _: call.interrupt()
    record = measured(call=call)
    assert (record.outcome, record.reason) == (Outcome.INTERRUPTED, "interrupted by the user")
    assert held()


def test_a_lock_that_cannot_be_had_is_that_cell_s_crash(
    measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_lock, "FOLDER", tmp_path / "gone")
    record = measured()
    assert record.outcome is Outcome.CRASH
    assert "no worker could be started: [Errno 2]" in record.reason

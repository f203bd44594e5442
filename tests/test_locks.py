"""Locks between processes."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.locks import locked

ROOT = Path(__file__).parent.parent
HOLDS = """
import sys
from pathlib import Path
from registry.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

Hold = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Hold a place in another process, which lets go when its stdin ends."""
    holders = []

    def start(place: Path) -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(place)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        return holder

    yield start
    for holder in holders:
        with holder:
            holder.kill()


@pytest.fixture(params=["file", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / "place"
    if request.param == "file":
        made.write_text("content")
    else:
        made.mkdir()
    return made


def test_what_another_process_holds_is_waited_for_no_longer_than_was_said(place: Path, hold: Hold) -> None:
    hold(place)
    start = time.monotonic()
    with pytest.raises(TimeoutError), locked(place, 0.3):
        pytest.fail("held twice")
    assert 0.3 <= time.monotonic() - start < 10


@pytest.mark.parametrize("end", ["lets go", "is killed"])
def test_what_another_process_held_is_had_once_it_ends(place: Path, hold: Hold, end: str) -> None:
    holder = hold(place)
    if end == "is killed":
        holder.kill()
    else:
        assert holder.stdin
        holder.stdin.close()
    with locked(place, 30):
        pass


def test_another_path_to_a_place_is_the_same_place(place: Path, hold: Hold, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    hold(tmp_path / "link")
    with pytest.raises(TimeoutError), locked(place, 0):
        pytest.fail("held twice")


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_a_lock_leaves_nothing_behind_and_its_place_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("content")
    before = file.stat()
    opened = descriptors()
    for _ in range(2):
        with locked(file, 0), locked(tmp_path, 0):
            pass
    assert [*tmp_path.iterdir()] == [file]
    assert (file.read_text(), file.stat().st_mtime_ns) == ("content", before.st_mtime_ns)
    assert descriptors() == opened


@pytest.mark.parametrize("why", ["not there", "no such locks"])
def test_what_cannot_be_locked_is_not(place: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no such locks":

        def flock(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", flock)
    else:
        place = place / "missing"
    entered = []
    with locked(place, 0):
        entered.append(True)
    assert entered


def test_an_error_under_a_lock_is_raised_and_lets_go(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), locked(tmp_path, 0):
        raise OSError("mine")
    with locked(tmp_path, 0):
        pass

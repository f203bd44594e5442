"""Who starts a worker and kills what is left of it, by itself."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from registry import keeper

PATIENCE_S = 60
ASLEEP = "import time; time.sleep(600)"
ORPHANS = """
import os, pathlib, subprocess, sys, time
bare = ["env", "-i", sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
subprocess.run(["sh", "-c", 'setsid "$@" & echo $!', "sh", *bare], check=True)
for _ in range(20):
    subprocess.run(["sh", "-c", "true &"], check=True)
time.sleep(1)
siblings = pathlib.Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
print(len(siblings), flush=True)
"""
"""Leaves an orphan that lives on and twenty that end at once; tells the first's PID and the keeper's children."""


def kept(code: str, before: str = "") -> tuple["subprocess.Popen[str]", socket.socket]:
    """A keeper whose worker runs some code; how the keeper is begun, and the line to it."""
    line, its_end = socket.socketpair()
    with its_end:
        mark = uuid.uuid4().hex
        told = [keeper.__file__, mark, str(its_end.fileno()), "PARENT", sys.executable, "-c", code]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", *(["-c", before] if before else []), *told],
            pass_fds=(its_end.fileno(),),
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {keeper.MARK: mark},
        )
    line.settimeout(PATIENCE_S)
    return process, line


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV),
        ("import os; assert os.environ['PARENT'] == str(os.getppid())", 0),
        ("import signal; assert not signal.getsignal(signal.SIGTERM)", 0),
        ("import os; assert os.getsid(0) == os.getpid()", 0),
    ],
)
def test_how_a_worker_ended_is_told(code: str, told: int) -> None:
    process, line = kept(code)
    with process, line:
        assert int(line.recv(16)) == told
        assert process.wait(PATIENCE_S) == 0


def test_an_orphan_without_its_environment_is_killed_and_every_one_is_buried() -> None:
    process, line = kept(ORPHANS)
    with process, line:
        assert line.recv(16) == b"0"
        assert process.stdout is not None
        orphan, children = int(process.stdout.readline()), int(process.stdout.readline())
        assert children == 2, "its worker and the orphan that lives"
        assert process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{orphan}").exists()


def test_a_line_that_ends_ends_the_worker() -> None:
    process, line = kept(f"import os; print(os.getpid(), flush=True); {ASLEEP}")
    with process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        line.close()
        assert process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{worker}").exists()


def test_who_does_not_descend_from_the_worker_lives_on() -> None:
    """Neither a process beside the keeper nor the caller's own orphan is touched."""
    with subprocess.Popen([sys.executable, "-c", ASLEEP]) as beside:
        process, line = kept("pass")
        with process, line:
            assert process.wait(PATIENCE_S) == 0
        assert beside.poll() is None
        beside.kill()


def test_where_orphans_cannot_be_adopted_the_mark_finds_them() -> None:
    """As on a machine without prctl(2)."""
    without = textwrap.dedent(
        """
        import runpy, sys
        sys.modules["ctypes"] = None
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """
    )
    process, line = kept('import subprocess; subprocess.run(["sh", "-c", "setsid sleep 600 & echo $!"])', without)
    with process, line:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        assert process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{orphan}").exists() or not (Path(f"/proc/{orphan}") / "cmdline").read_bytes()

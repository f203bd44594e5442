"""What ends with a cell however that ends: a process that starts the worker, sleeps, then kills who is left.

    python registry/keeper.py MARK LINE PARENT COMMAND...

COMMAND is the worker's. It is told this process's PID in the environment variable PARENT and dies with it
(`registry.worker.die_with_parent`); what it started does not, but has this process for its parent once its own is
gone: whoever descends from here descends from the worker, whatever it did to its session and environment.
LINE is one end of a socket whose other end is the caller's alone. On it the caller is told the worker's exit code; it
ends when the caller does, or wants the worker no more. Until either happens this process sleeps in poll(2) and takes
nothing from a step that is timed, unless an orphan has to be buried. It imports nothing of ours and little else: the
worker waits for it.
"""

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

MARK = "RFLOOR_WORKER"
"""Environment variable that tells a worker and its descendants from all other processes."""
PROC = Path("/proc")
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a caller in good order, which then ends its line."""
CHANGED = (*DEAF_TO, signal.SIGPIPE, signal.SIGXFSZ)
"""What this process does not hear, Python's own among it, and the worker is to."""


def kill_marked(mark: str) -> None:
    """Kill every process that bears a mark but this one, until there is none."""
    while left := [pid for pid in _pids() if pid != os.getpid() and _bears(pid, mark)]:
        for pid in left:
            with contextlib.suppress(OSError):  # it ended by itself
                process = os.pidfd_open(pid)
                try:
                    if _bears(pid, mark):  # and its PID is not another's now
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                        select.select([process], [], [])
                finally:
                    os.close(process)


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]


def _bears(pid: int, mark: str) -> bool:
    """Whether a living process has inherited a worker's environment."""
    try:
        return f"{MARK}={mark}".encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def adopt() -> bool:
    """Become the parent of every descendant whose own has ended; false where the machine knows no such thing."""
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def kill_children() -> None:
    """Kill this process's children, and theirs, which become its own, until there is none.

    A child keeps its PID until it is buried here: no other process can be hit.
    """
    while left := [pid for pid in _children() if _killed(pid)]:
        os.waitpid(left[0], 0)


def _children() -> list[int]:
    return [pid for pid in _pids() if _parent(pid) == os.getpid()]


def _parent(pid: int) -> int:
    """A process's parent; 0 if it has ended."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # a name may hold blanks and brackets


def _killed(pid: int) -> bool:
    """Whether a child ends now: another user's, as sudo starts it, does not."""
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def _bury(worker: int) -> int | None:
    """Bury every child that has ended; the worker's exit code if it is one of them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == worker:
                code = os.waitstatus_to_exitcode(status)
    return code


def _wait(worker: int, line: int, woken: int) -> int | None:
    """Sleep until the worker ends, or the line does; the exit code, if the worker has one.

    Args:
        worker: A child.
        line: Nothing is ever read from it: it ends.
        woken: Readable once a child has ended.
    """
    poller = select.poll()
    poller.register(line, select.POLLIN)
    poller.register(woken, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poller.poll()]
        if woken in ready:
            os.read(woken, 1 << 12)
            code = _bury(worker)
            if code is not None:
                return code
        if line in ready:
            return None


def keep(mark: str, line: int, parent: str, command: list[str]) -> None:
    """Start a worker, and let neither it nor what it starts outlive this call."""
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.set_inheritable(line, False)
    adopted = adopt()
    environment = os.environ | {parent: str(os.getpid())}
    worker = os.posix_spawn(command[0], command, environment, setsid=True, setsigdef=CHANGED)
    os.chdir("/")
    code = _wait(worker, line, woken)
    if code is not None:
        with contextlib.suppress(OSError):  # the caller has ended
            os.write(line, str(code).encode())
    if not adopted:
        with contextlib.suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
    kill_children()
    kill_marked(mark)


if __name__ == "__main__":
    keep(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])

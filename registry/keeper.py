"""What ends with a sweep however that ends: a process that sleeps until its parent is gone, then kills who is left.

    python registry/keeper.py MARK < PIPE

A worker dies with its parent (`registry.worker.die_with_parent`), what it started does not. The one write end of PIPE
is the parent's, so PIPE ends when the parent does. Until then this process sleeps in read(2) and takes nothing from a
step that is timed. It imports nothing of ours and little else: it is there before the worker is.
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
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a parent in good order, which then has no use for this process."""


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


if __name__ == "__main__":
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])

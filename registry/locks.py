"""Files and folders that one process holds at a time, and whose hold ends with it, however it ends (flock(2))."""

from __future__ import annotations

import fcntl
import math
import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOOK_S = 0.05


def held(place: Path, patience_s: float = 0.0) -> ExitStack | None:
    """Hold a file or folder until what is returned is closed; `None` if another process does.

    The lock leaves nothing behind. It knows a place by its inode, so another path to it is the same place and a copy
    is another. It reaches the processes of one machine; those of several that share a file over NFS too, if they may
    write it. Where a file system has no such lock, nothing is held and nothing is told.

    Args:
        place: Has to exist; its content is left alone.
        patience_s: Seconds for which the other may hold it.

    Raises:
        OSError: It cannot be opened.
    """
    with ExitStack() as stack:
        descriptor = _opened(place)
        stack.callback(os.close, descriptor)
        end = time.monotonic() + patience_s
        while not taken(descriptor):
            if time.monotonic() >= end:
                return None
            time.sleep(LOOK_S)
        return stack.pop_all()


def taken(descriptor: int) -> bool:
    """Whether an open file is held now, by this process and whoever inherits the descriptor; it does not wait."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no such locks
        return True
    return True


@contextmanager
def locked(place: Path, patience_s: float = math.inf) -> Iterator[None]:
    """Hold a file or folder for a while; one that cannot be opened is not held, and nothing is told.

    Args:
        place: See `held`.
        patience_s: Seconds to wait for whoever holds it.

    Raises:
        TimeoutError: Somebody has held it all the time.
    """
    try:
        stack = held(place, patience_s)
    except OSError:
        stack = ExitStack()
    if stack is None:
        raise TimeoutError
    with stack:
        yield


def _opened(place: Path) -> int:
    """A descriptor that may write where that is allowed: NFS wants it."""
    try:
        return os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC)

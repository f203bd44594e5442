"""Waiting for other processes: a lock between those of one machine, and asking again for what may pass."""

from __future__ import annotations

import fcntl
import math
import os
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")
LOOK_S = 0.05
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 4.0


@contextmanager
def locked(place: Path, patience_s: float = math.inf) -> Iterator[None]:
    """Hold a file or folder alone among the processes that ask here for the same one.

    The lock is flock(2)'s: it leaves nothing behind and ends with its process, however that ends. It knows a place by
    its inode, so another path to it is the same place and a copy is another. It reaches the processes of one machine;
    those of several that share a file over NFS too, if they may write it. Where a file system has no such lock,
    nothing is held and nothing is told.

    Args:
        place: What is held; its content is left alone.
        patience_s: Seconds to wait for whoever holds it.

    Raises:
        TimeoutError: Somebody has held it all the time.
    """
    try:
        descriptor = _opened(place)
    except OSError:
        yield
        return
    try:
        _lock(descriptor, time.monotonic() + patience_s)
        yield
    finally:
        os.close(descriptor)


def _opened(place: Path) -> int:
    """A descriptor that may write where that is allowed: NFS wants it."""
    try:
        return os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC)


def _lock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
        except OSError:
            return
        else:
            return
        time.sleep(LOOK_S)


def persist(call: Callable[[], T], may_pass: Callable[[Exception], bool], patience_s: float) -> T:
    """Call until it answers.

    Args:
        call: What may fail for a while. It is called again whatever it has done until then.
        may_pass: Whether what it raised may be gone a little later.
        patience_s: Seconds after which no other attempt is begun; one that is under way is waited for.

    Raises:
        Exception: The last that was raised, once there is no use or no time to try again.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:
            if not may_pass(error) or time.monotonic() - start + pause > patience_s:
                raise
        time.sleep(pause * random.uniform(0.5, 1))  # those that met once need not meet again
        pause = min(2 * pause, LONGEST_PAUSE_S)

"""Who waits in poll(2) is woken by inotify(7) when a file changes; nothing looks at it meanwhile."""

from __future__ import annotations

import ctypes
import os

IN_MODIFY, IN_MOVED_TO = 0x00000002, 0x00000080
"""A file was written to; one was renamed into a folder."""
EVENTS = 1 << 16  # bytes of them that are read at once


def watch(path: str, event: int) -> int:
    """A descriptor that poll(2) finds readable once that has happened to a file or folder.

    Its owner closes it; it is -1 where the machine has no more.
    """
    libc = ctypes.CDLL(None)
    descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor >= 0:
        libc.inotify_add_watch(descriptor, os.fsencode(path), event)
    return descriptor


def take(descriptor: int) -> None:
    """Read what has happened, so that the descriptor is readable at the next event alone."""
    os.read(descriptor, EVENTS)

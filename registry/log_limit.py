"""A worker's log, kept below a size: of one that outgrows it the beginning and the end stay.

Who waits for the worker is woken by inotify(7) for what is printed, and by nothing else: a worker that prints nothing
while it times a step is not looked at meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from registry import inotify
from registry.logs import cut

if TYPE_CHECKING:
    from typing import BinaryIO, Self

LIMIT = 32 << 20
"""Bytes beyond which a log is shortened."""
KEPT = 8 << 20
"""Bytes that stay of its beginning, and of its end."""
LEFT_OUT = b"\nrfloor: this log outgrew its limit, and its middle is left out here\n"
BEGIN = re.compile(rb"[\n)\]};\s,]")
"""Behind what the end may begin: no secret is cut from its name."""


class LogLimit:
    """Shortens a log while others append to it.

    Args:
        log: Open for appending, by whoever prints too.
    """

    def __init__(self, log: BinaryIO) -> None:
        file = f"/proc/self/fd/{log.fileno()}"
        self._log = os.open(file, os.O_RDWR | os.O_CLOEXEC)  # appends nothing, and writes where it is told to
        self._head = 0
        self.written = inotify.watch(file, inotify.IN_MODIFY)
        """A descriptor that poll(2) finds readable once something was printed; -1 where the machine has no more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold()
        os.close(self._log)
        if self.written >= 0:
            os.close(self.written)

    def look(self) -> None:
        """Take note of what was printed."""
        inotify.take(self.written)
        self.hold()

    def hold(self) -> None:
        """Shorten the log if it is too long: what is printed in the moment of the cut may go with the middle."""
        size = os.fstat(self._log).st_size
        if size <= LIMIT:
            return
        with contextlib.suppress(OSError):  # it costs no cell
            if not self._head:
                self._head = cut(os.pread(self._log, KEPT, 0))
            end = os.pread(self._log, KEPT, size - KEPT)
            place = self._head + os.pwrite(self._log, LEFT_OUT + end[_begin(end) :], self._head)
            since = os.pread(self._log, os.fstat(self._log).st_size - size, size)
            os.ftruncate(self._log, place + os.pwrite(self._log, since, place))


def _begin(end: bytes) -> int:
    """Where the rest of a log can begin; where nothing in it can be told apart, at its end."""
    key = end.find(b"-----END ")
    if key >= 0 and not 0 <= end.find(b"-----BEGIN ") < key:  # of a private key that began before
        end_of_key = end.find(b"-----", key + len(b"-----END "))
        return len(end) if end_of_key < 0 else end_of_key + len(b"-----")
    found = BEGIN.search(end)
    return found.end() if found else len(end)

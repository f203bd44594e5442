"""Files that one process holds at a time and whose hold ends with it, however it ends (flock(2))."""

from __future__ import annotations

import fcntl
import time
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def held(file: Path, patience_s: float = 0.0) -> IO[bytes] | None:
    """Hold an existing file until what is returned is closed; `None` if another process does.

    Args:
        file: Need not be writable.
        patience_s: Seconds for which the other may hold it.

    Raises:
        OSError: It cannot be read.
    """
    stream = file.open("rb")
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            if time.monotonic() >= end:
                stream.close()
                return None
            time.sleep(0.05)

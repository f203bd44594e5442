"""Files that one process holds at a time and whose hold ends with it, however it ends (flock(2))."""

from __future__ import annotations

import fcntl
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def held(file: Path) -> IO[bytes] | None:
    """Hold an existing file until what is returned is closed; `None` while another process does.

    Raises:
        OSError: It cannot be read.
    """
    stream = file.open("rb")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream

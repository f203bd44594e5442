"""A folder out of which code is loaded: nobody but its user may put anything into it."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

OTHERS_WRITE = 0o022


def shared(folder: Path) -> str:
    """Who else may write into a folder, empty if nobody (but root) or if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        found = folder.stat()
        if found.st_uid != os.geteuid():
            return f"it belongs to another user ({found.st_uid}), and compiled kernels are loaded out of it"
        if found.st_mode & OTHERS_WRITE:
            return f"others may write into it, and compiled kernels are loaded out of it: chmod go-w {folder}"
    return ""


def made(folder: Path) -> None:
    """Make a folder that is its user's alone, if it is not there.

    Raises:
        OSError: It cannot be made, or is there and not this user's alone.
    """
    for place in reversed([folder, *folder.parents]):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
    if why := shared(folder):
        raise PermissionError(errno.EPERM, why, str(folder))

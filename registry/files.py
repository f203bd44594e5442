"""Files that others made: read without waiting for whoever never writes, and no more of them than can be meant."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

LARGEST = 128 << 20
"""Bytes of a text that is read as a whole: an index of a million tensors, a record of five million steps."""

MOST_FILES = 64 << 10
"""Bytes that most files fit into: room for the largest, made for each of ten thousand, takes half of their time."""


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A regular file, or what a link leads to, to read from.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe or a device.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(file))
        yield stream


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        OSError: As `read_bytes`.
        ValueError: It is not UTF-8.
    """
    return read_bytes(file).decode("utf-8")


def read_bytes(file: Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: As `opened`, or it is larger than any that can be meant.
    """
    with opened(file) as stream:
        data = stream.read(MOST_FILES)
        if len(data) == MOST_FILES:
            data += stream.read(LARGEST + 1 - MOST_FILES)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MiB", str(file))
    return data

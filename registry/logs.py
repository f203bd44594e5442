"""A worker's log: written raw where nobody else looks, and cleaned of secrets once the worker has ended.

The worker appends straight to a file, which `registry.log_limit` keeps below a size. Nothing reads along, so nothing
that is printed waits, and where nothing is printed nothing wakes while a step is timed.
Until it is cleaned the file is hidden and its owner's alone, under a lock that lives as long as whoever writes it.
What a killed call leaves behind nobody can clean, for what that call knew of secrets went with it (its environment,
its overrides): the next call, or import, that finds it puts a line in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from registry import files
from registry.redact import Redactor, environment_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

CHUNK = 1 << 20
"""Bytes that are looked at at a time, together with the rest of the last ones."""
KEY_REACH = 1 << 15
"""Bytes within which a private key that has begun has to end."""
WITHHELD = "the call that wrote this log was killed, and what it knew of its secrets is lost"
ENDS = (re.compile(rb"\n"), re.compile(rb"[)\]};]"), re.compile(rb"[\s,]"))
"""Where a log may be cut without cutting a secret from its name, the best place first."""


@contextmanager
def opened(file: Path, redactor: Redactor | None = None) -> Iterator[BinaryIO]:
    """A file for a process to append to, which is `file` once it is left and clean.

    Args:
        file: The log; its folder is made.
        redactor: Knows the secrets; those of this process's environment if it is not given.
    """
    raw, unlocked = _raw(file), file.with_name(f".{file.name}.new")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(unlocked, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        unlocked.rename(raw)  # locked before anybody can find it
        try:
            yield output
        finally:
            output.flush()
            _finish(raw, file, redactor or of_environment())


def of_environment() -> Redactor:
    """What knows the secrets of this process's environment."""
    return Redactor(environment_secrets(os.environ))


def finish_abandoned(folder: Path) -> None:
    """Withhold the logs under a folder of records whose writers were killed."""
    for raw in folder.rglob(".*.log"):
        with contextlib.suppress(OSError), files.opened(raw) as stream:  # held by its writer, or another's
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(stream.fileno()).st_size
            _replace(raw, raw.with_name(raw.name[1:]), f"{WITHHELD} ({size} bytes are withheld)")


def clean(source: Path, target: Path, redactor: Redactor) -> None:
    """Copy a log without its secrets, however large it is.

    Raises:
        OSError: One cannot be read, or the other written.
    """
    with files.opened(source) as stream, target.open("wb") as output:
        data = b""
        while piece := stream.read(CHUNK):
            data += piece
            whole = cut(data)
            output.write(redactor.data(data[:whole]))
            data = data[whole:]
        output.write(redactor.data(data))


def _finish(raw: Path, file: Path, redactor: Redactor) -> None:
    """Put the clean log in the raw one's place; one that cannot be cleaned is not kept."""
    temporary = _temporary(file)
    try:
        clean(raw, temporary, redactor)
        temporary.replace(file)
    except OSError as error:
        _replace(raw, file, f"the log could not be cleaned of secrets: {error.strerror or error}")
    else:
        _remove(raw)


def _replace(raw: Path, file: Path, told: str) -> None:
    """Put a line in a raw log's place."""
    with contextlib.suppress(OSError):
        file.write_text(f"rfloor: {told}\n", encoding="utf-8")
    _remove(raw, _temporary(file))


def _remove(*left: Path) -> None:
    for one in left:
        with contextlib.suppress(OSError):
            one.unlink(missing_ok=True)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.clean")


def _raw(file: Path) -> Path:
    return file.with_name(f".{file.name}")


def cut(data: bytes) -> int:
    """How many of a log's bytes, from its beginning, can be cleaned without those that follow."""
    places = (max((match.end() for match in end.finditer(data)), default=0) for end in ENDS)
    place = next(filter(None, places), len(data))
    begun = data.rfind(b"-----BEGIN ", 0, place)
    if begun > data.rfind(b"-----END ", 0, place) and begun > len(data) - KEY_REACH:
        return begun or len(data)
    return place

"""Traces of profiled steps without their secrets: whoever annotates steps names them as they please."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import TYPE_CHECKING, Any

from registry import files

if TYPE_CHECKING:
    from pathlib import Path

    from registry.redact import Redactor


def clean(source: Path, target: Path, redactor: Redactor) -> bool:
    """Write a trace without its secrets; false, and nothing written, where it is not to be read.

    Raises:
        OSError: There is no room for it.
    """
    try:
        content = _read(source)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return False
    with gzip.open(target, "wt", encoding="utf-8") as stream:
        json.dump(redactor.plain(content), stream)  # text by text, so that it stays JSON
    return True


def _read(file: Path) -> Any:
    """What a trace holds.

    Raises:
        OSError: It cannot be read, or is no gzip.
        ValueError: It is no JSON, or larger than any that rfloor writes.
    """
    with files.opened(file) as packed, gzip.open(packed) as stream:
        data = stream.read(files.LARGEST + 1)
    if len(data) > files.LARGEST:
        raise ValueError(f"{file} is larger than {files.LARGEST >> 20} MiB")
    return json.loads(data)

"""A folder of records: what is in it, and what only looks like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry import manifest
from registry import record as records
from registry import registration as registrations
from registry.complete import complete
from registry.record import Record
from registry.registration import KIND, Registration

if TYPE_CHECKING:
    from pathlib import Path


def everything_in(folder: Path) -> tuple[list[tuple[Path, Record | Registration]], list[str]]:
    """Every record and registration under a folder with its file, and a line for each JSON file that is neither.

    The manifests of sweeps are passed over: they say what was to be measured.
    """
    found: list[tuple[Path, Record | Registration]] = []
    problems = []
    for file in sorted(folder.rglob("*.json")):
        try:
            content = records.read_json(file)
            if not (isinstance(content, dict) and content.get("kind") == manifest.KIND):
                found.append((file, _of_any_kind(content)))
        except records.BadRecord as error:
            problems.append(f"{file}: {error}")
    return found, problems


def records_in(folder: Path) -> tuple[list[Record], list[str]]:
    """The records alone, those of which something can be told; the others are among the problems."""
    everything, problems = everything_in(folder)
    found = []
    for file, one in everything:
        try:
            found += [complete(one)] if isinstance(one, Record) else []
        except records.BadRecord as error:
            problems.append(f"{file}: {error}")
    return found, problems


def _of_any_kind(content: Any) -> Record | Registration:
    """What a JSON file beside the records is.

    Raises:
        BadRecord: Neither a record nor a registration.
    """
    if isinstance(content, dict) and content.get("kind") == KIND:
        return registrations.from_json(content)
    return records.from_plain(content)

"""What a call sets out to measure: one file a sweep beside the records, held by the process that measures it.

With it a sweep that was killed can be told from one that is complete, and can be taken up again.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry import faults
from registry.locks import held
from registry.record import BadRecord, What, read_json, write_json
from registry.schema import from_plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KIND = "sweep"
FOLDER = "sweeps"
SCHEMA_VERSION = 1
LARGEST_INDEX = 2**31
"""From which on no sweep has a place: a number that lies there is damage."""
GLANCE_S = 1.0
"""Seconds for which somebody who only looks (`is_held`) may be in the way."""


@dataclass(frozen=True)
class Planned:
    """One cell in one session.

    Attributes:
        index: Its place in the sweep, from 0.
        cell_id: The identity of what is measured.
        session: Which of the sweep's sessions, from 0.
        experiment: That it is measured for; empty for none.
        label: The cell in one line, and what of its call makes it another one than the rest of the sweep.
    """

    index: int
    cell_id: str
    session: int
    experiment: str
    label: str

    @property
    def what(self) -> What:
        """What a record of it answers."""
        return What(self.cell_id, self.session, self.experiment)


@dataclass(frozen=True)
class Manifest:
    """A sweep's cells.

    Attributes:
        sweep_id: Ties its records together.
        started_at: When it was first begun; UTC, ISO 8601.
        jobs: In the order in which they are to run.
    """

    sweep_id: str
    started_at: str
    jobs: list[Planned]


def path(folder: Path, sweep_id: str) -> Path:
    """Where a sweep's manifest lies under the folder of records."""
    return folder / FOLDER / f"{sweep_id}.json"


def read(file: Path) -> Manifest:
    """Read a manifest.

    Raises:
        BadRecord: The file is none.
    """
    try:
        content = read_json(file)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise BadRecord("no sweep's manifest")
        if (version := content.get("schema_version")) != SCHEMA_VERSION:
            raise BadRecord(f"schema version {version!r} of a sweep, this rfloor reads {SCHEMA_VERSION}")
        own: dict[str, Any] = {key: value for key, value in content.items() if key not in ("kind", "schema_version")}
        found = from_plain(Manifest, own)
        if found.sweep_id != file.stem:
            raise BadRecord(f"the manifest of the sweep {found.sweep_id!r}")
        if any(not 0 <= job.index < LARGEST_INDEX for job in found.jobs):
            raise BadRecord(f"a job's place is 0 or more, and less than {LARGEST_INDEX}")
        return found
    except (BadRecord, TypeError, ValueError) as error:
        raise BadRecord(f"{file}: {error}") from error


def manifests(folder: Path) -> list[Manifest]:
    """Every readable manifest under the folder of records, the newest first."""
    found = []
    for file in sorted((folder / FOLDER).glob("*.json"), reverse=True):
        try:
            found.append(read(file))
        except BadRecord:
            continue
    return found


def extended(folder: Path, sweep_id: str, jobs: list[Planned]) -> Manifest:
    """The manifest of a sweep that now has these jobs too; a new one if it has none that can be read."""
    now = faults.now().isoformat(timespec="milliseconds")
    begun = Manifest(sweep_id, now, [])
    with suppress(BadRecord):
        begun = read(path(folder, sweep_id))
    known = {job.index: job for job in begun.jobs} | {job.index: job for job in jobs}
    return Manifest(sweep_id, begun.started_at, [known[index] for index in sorted(known)])


def hold(folder: Path, sweep_id: str, planned: Callable[[], Manifest]) -> ExitStack | None:
    """Write a manifest and hold it, until what is returned is closed; `None` while another process holds it.

    The file that was there is held too: whoever opened it before it was replaced must not think it free.

    Args:
        folder: Of the records.
        sweep_id: Whose it is.
        planned: What is to be written, asked for once the file that was there is held: what was known before that,
            another process may have changed until it ended.
    """
    file = path(folder, sweep_id)
    with ExitStack() as stack:
        if file.exists() and not _joined(stack, file):
            return None
        content = dataclasses.asdict(planned())
        write_json(file, {"schema_version": SCHEMA_VERSION, "kind": KIND, **content})
        return stack.pop_all() if _joined(stack, file) else None


def _joined(stack: ExitStack, file: Path) -> bool:
    """Hold a file with what is held already; whether that could be."""
    if lock := held(file, GLANCE_S):
        stack.enter_context(lock)
    return lock is not None


def is_held(folder: Path, sweep_id: str) -> bool:
    """Whether a process is measuring a sweep now."""
    if (lock := held(path(folder, sweep_id))) is None:
        return True
    lock.close()
    return False

"""How far the sweeps in a folder of records are, out of their manifests and the beginnings of their records."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from registry import record as records
from registry.manifest import FOLDER, is_held, manifests
from registry.outcome import Outcome
from registry.registration import FOLDER as REGISTRATIONS
from registry.resume import answered, ok_by_what

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry.manifest import Planned
    from registry.record import Head


@dataclass
class Status:
    """A sweep.

    Attributes:
        sweep_id: Its name.
        started_at: When it was begun; UTC, ISO 8601.
        planned: How many cells it has, over all sessions; `None` for one of an earlier version, which nobody noted.
        done: How many are measured, in this sweep or in another one: what a resumed sweep would not measure again.
        failed: The last attempts of the others that were tried, and their files.
        missing: What has no record.
        running: Whether a process measures it now.
    """

    sweep_id: str
    started_at: str
    planned: int | None
    done: int
    failed: list[tuple[Head, Path]] = field(default_factory=list)
    missing: list[Planned] = field(default_factory=list)
    running: bool = False

    @property
    def state(self) -> str:
        """One word."""
        if self.running:
            return "running"
        return "cut short" if self.missing else "ended"


def statuses(folder: Path) -> tuple[list[Status], list[str]]:
    """Every sweep under a folder, the oldest first, and a line for each file that lies there as a record and is none.

    Args:
        folder: Of the records.
    """
    heads: dict[str, list[tuple[Head, Path]]] = defaultdict(list)
    problems = []
    for file in _files(folder):
        try:
            head = records.head(file)
        except records.BadRecord as error:
            problems.append(str(error))
            continue
        heads[head.sweep_id].append((head, file))
    plans = {plan.sweep_id: plan for plan in manifests(folder)}
    ok = ok_by_what(head for own in heads.values() for head, _ in own)
    found = []
    for sweep_id in sorted({*heads, *plans}):
        own = sorted(heads[sweep_id], key=_attempt)
        plan = plans.get(sweep_id)
        jobs = (
            [(one.index, one.what) for one in plan.jobs]
            if plan
            else [*dict.fromkeys((head.index, head.what) for head, _ in own)]
        )
        done = answered(jobs, ok, sweep_id)
        last = {(head.index, head.what): (head, file) for head, file in own if head.outcome is not Outcome.OK}
        left = [number for number in range(len(jobs)) if number not in done]
        failed = [last[jobs[number]] for number in left if jobs[number] in last]
        if plan:
            told = {job.index: job.label for job in plan.jobs}
            failed = [(replace(head, label=told[head.index]), file) for head, file in failed]
            missing = [plan.jobs[number] for number in left if jobs[number] not in last]
            running = is_held(folder, sweep_id)
            found.append(Status(sweep_id, plan.started_at, len(jobs), len(done), failed, missing, running))
        else:
            began = min(head.started_at for head, _ in own)
            found.append(Status(sweep_id, began, None, len(done), failed))
    return found, sorted(problems)


def _attempt(found: tuple[Head, Path]) -> tuple[int, int]:
    """What a sweep's records are sorted by: the last attempt at a place is behind those before it."""
    return found[0].index, found[0].attempt


def _files(folder: Path) -> Iterator[Path]:
    """What lies where records lie; at a third of the time that `Path.glob` takes for ten thousand."""
    if not folder.is_dir():
        return
    for own in os.scandir(folder):
        if own.name not in (FOLDER, REGISTRATIONS) and own.is_dir():
            yield from (Path(one.path) for one in os.scandir(own.path) if one.name.endswith(".json"))

"""A sweep taken up again: which of its cells are measured already, and under which name it goes on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry import record as records
from registry.manifest import manifests
from registry.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from registry.manifest import Manifest
    from registry.record import Record, What


@dataclass
class Before:
    """What was measured before.

    Attributes:
        sweep_id: Under which the sweep goes on; empty where nothing was begun.
        places: Where in that sweep each job stands.
        found: The ok record of each place in the call that has one.
        problems: Files that lie where records should and are none.
    """

    sweep_id: str
    places: list[int]
    found: dict[int, Record]
    problems: list[str]


def look(jobs: Sequence[What], folder: Path, profiled: bool) -> Before:
    """Find what is left of a sweep: of all of which there are traces, that which shares most cells with the call.

    Args:
        jobs: The cells of the call, in order.
        folder: Of the records.
        profiled: Whether steps are to be profiled: a record without a profile then is not what is asked for.
    """
    kept, problems = _records({cell_id for cell_id, *_ in jobs}, folder)
    plans = {one.sweep_id: one for one in manifests(folder)}
    known = {name: {job.what for job in plan.jobs} for name, plan in plans.items()}
    for record in kept:  # of a sweep without a manifest, as earlier versions left them, or of one with
        known.setdefault(record.sweep_id, set()).add(record.what)
    shared = {name: len(whats & set(jobs)) for name, whats in known.items()}
    sweep_id = max((name for name in shared if shared[name]), key=lambda name: (shared[name], name), default="")
    ok: dict[What, list[Record]] = defaultdict(list)
    for record in sorted(kept, key=lambda one: (one.sweep_id != sweep_id, one.started_at)):
        if record.outcome is Outcome.OK and (not profiled or "profile" in record.measured):
            ok[record.what].append(record)
    found = {place: ok[what].pop(0) for place, what in enumerate(jobs) if ok[what]}
    return Before(sweep_id, _places(jobs, plans.get(sweep_id)), found, problems)


def _records(cells: Iterable[str], folder: Path) -> tuple[list[Record], list[str]]:
    found, problems = [], []
    for cell_id in cells:
        for file in sorted((folder / cell_id).glob("*.json")):
            try:
                found.append(records.read(file))
            except records.BadRecord as error:
                problems.append(str(error))
    return found, problems


def _places(jobs: Sequence[What], begun: Manifest | None) -> list[int]:
    """Each job's place in the sweep that goes on; what is new to it comes behind what it had."""
    if begun is None:
        return [*range(len(jobs))]
    known: dict[What, list[int]] = defaultdict(list)
    for job in begun.jobs:
        known[job.what].append(job.index)
    new = iter(range(max((job.index for job in begun.jobs), default=-1) + 1, 2**31))
    return [known[what].pop(0) if known[what] else next(new) for what in jobs]

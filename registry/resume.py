"""A sweep taken up again: which of its cells are measured already, and under which name it goes on."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from registry import record as records
from registry.manifest import manifests
from registry.outcome import Outcome
from registry.record import Head, What

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from registry.manifest import Manifest
    from registry.record import Record

Found = TypeVar("Found", bound=Head)


@dataclass
class Before:
    """What was measured before.

    Attributes:
        sweep_id: Under which the sweep goes on; empty where nothing was begun.
        places: Where in that sweep each job stands.
        found: The ok record of each place in the call that has one.
        problems: Files that lie where records should and are none.
        new: How many jobs of the call that sweep has not had yet.
        others: How many jobs it has had that are not in the call.
    """

    sweep_id: str
    places: list[int]
    found: dict[int, Record]
    problems: list[str]
    new: int = 0
    others: int = 0


def look(jobs: Sequence[What], folder: Path, profiled: bool, sweep_id: str = "") -> Before:
    """Find what is left of a sweep: of all of which there are traces, that which shares most cells with the call.

    Args:
        jobs: The cells of the call, in order.
        folder: Of the records.
        profiled: Whether steps are to be profiled: a record without a profile then is not what is asked for.
        sweep_id: The sweep that goes on, where that is known already.
    """
    kept, problems = _records({cell_id for cell_id, *_ in jobs}, folder)
    plans = {one.sweep_id: one for one in manifests(folder)}
    known = {name: {job.what for job in plan.jobs} for name, plan in plans.items()}
    for record in kept:  # of a sweep without a manifest, as earlier versions left them, or of one with
        known.setdefault(record.sweep_id, set()).add(record.what)
    shared = {name: len(whats & set(jobs)) for name, whats in known.items()}
    sweep_id = sweep_id or max(
        (name for name in shared if shared[name]), key=lambda name: (shared[name], name), default=""
    )
    places = _places(jobs, plans.get(sweep_id))
    ok = ok_by_what(record for record in kept if not profiled or "profile" in record.measured)
    found = answered([*zip(places, jobs, strict=True)], ok, sweep_id)
    if not (begun := plans.get(sweep_id)):  # what it was to have is not known
        return Before(sweep_id, places, found, problems)
    had, asked = Counter(job.what for job in begun.jobs), Counter(What(*job) for job in jobs)
    return Before(sweep_id, places, found, problems, (asked - had).total(), (had - asked).total())


def ok_by_what(found: Iterable[Found]) -> dict[What, list[Found]]:
    """The ok records among some, by what they answer, the oldest first: each once, however many copies there are."""
    ok: dict[What, list[Found]] = defaultdict(list)
    for one in {one.record_id: one for one in found if one.outcome is Outcome.OK}.values():
        ok[one.what].append(one)
    return {what: sorted(own, key=lambda one: one.started_at) for what, own in ok.items()}


def answered(jobs: Sequence[tuple[int, What]], ok: Mapping[What, Sequence[Found]], sweep_id: str) -> dict[int, Found]:
    """The record of each job that is measured, by its number in `jobs`: a record answers one job and no second one.

    A job that was measured at its own place has that record; of the others the sweep's come first.

    Args:
        jobs: Each with its place in the sweep.
        ok: Of `ok_by_what`.
        sweep_id: The sweep's.
    """
    found: dict[int, Found] = {}
    taken: set[str] = set()
    for own_place in (True, False):
        for number, (place, what) in enumerate(jobs):
            if number in found:
                continue
            left = [one for one in ok.get(what, ()) if one.record_id not in taken]
            own = [one for one in left if one.sweep_id == sweep_id]
            if chosen := [one for one in own if one.index == place] if own_place else own or left:
                found[number] = chosen[0]
                taken.add(chosen[0].record_id)
    return found


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
    had = {job.index for job in begun.jobs}
    new = (place for place in count(len(had)) if place not in had)  # also where a damaged one has a place beyond all
    return [known[what].pop(0) if known[what] else next(new) for what in jobs]

"""Runs as a report sees them: cells over their sessions, and the pairs that an experiment compares."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from registry import stats
from registry.display import place_of
from registry.outcome import Outcome
from registry.repeats import by_cell
from registry.report.labels import telling, tiers
from registry.schema import what_decides

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from registry.record import Record
    from registry.schema import ExperimentConfig

TPOT = "median_tpot_ms"
AGAIN = "revisit_median_tpot_ms"
"""Medians of a step's time: of the first visit of its positions, and of the second."""
PLAIN = {"quant": "none", "attention": "sdpa", "backend": "hf"}
"""The choice on each axis that others are set against."""


@dataclass(frozen=True)
class Observation:
    """One run.

    Attributes:
        record: What it measured.
        run_id: MLflow's; empty where MLflow did not take it.
        traced: Whether the trace of its profiled steps was kept.
    """

    record: Record
    run_id: str = ""
    traced: bool = False

    @property
    def device(self) -> str:
        """The device's own name."""
        return str(self.record.environment.get("device", {}).get("name", ""))

    @property
    def trace(self) -> str:
        """What a figure is traced by: the run, else the record."""
        return self.run_id or self.record.record_id


@dataclass(frozen=True)
class Measured:
    """One cell on one device, over its sessions.

    Attributes:
        observations: Its runs, in the order in which they began.
        copy: Of a cell that a call asks for several times which this is, from 0.
    """

    observations: tuple[Observation, ...]
    copy: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, equal in every session."""
        return self.observations[0].record.config

    @property
    def device(self) -> str:
        """The device's own name."""
        return self.observations[0].device

    @cached_property
    def ok(self) -> tuple[Observation, ...]:
        """The runs that have figures."""
        return tuple(o for o in self.observations if o.record.outcome is Outcome.OK)

    @property
    def traces(self) -> str:
        """The runs that its figures come from, in a picture's hover text."""
        return f"run {', '.join(o.trace for o in self.ok)}"

    @property
    def outcome(self) -> str:
        """How the cell ended: one word where its sessions agree, else each with its number."""
        counts = Counter(o.record.outcome.value for o in self.observations)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{word} x{n}" for word, n in counts.items())

    @property
    def reason(self) -> str:
        """Why sessions have no figures; empty where all have."""
        return "; ".join(dict.fromkeys(o.record.reason for o in self.observations if o.record.reason))

    def values(self, metric: str) -> list[float]:
        """A metric in each session that has it."""
        return [o.record.metrics[metric] for o in self.ok if metric in o.record.metrics]

    def median(self, metric: str) -> float | None:
        """Median over the sessions; `None` where none has it."""
        found = self.values(metric)
        return float(np.median(found)) if found else None

    def mean(self, metric: str) -> float:
        """Mean over the sessions, of which one at least has it."""
        return float(np.mean(self.values(metric)))

    def spread_of(self, metric: str) -> float | None:
        """Coefficient of variation of a metric across the sessions; `None` for one."""
        return stats.variation(self.values(metric))

    @property
    def spread(self) -> stats.Spread:
        """Of what was timed, steps or a kernel's calls, within and across the sessions that have some."""
        return stats.spread([o.record.step_times_ms or o.record.call_times_us for o in self.ok])


@dataclass(frozen=True)
class Pair:
    """Two arms of one block over the sessions in which both have figures.

    Attributes:
        baseline: The one arm's runs, session by session.
        candidate: The other arm's, of the same sessions.
        comparison: What they say.
        label: The block in a few words, which no other pair of the report has.
    """

    baseline: Measured
    candidate: Measured
    comparison: stats.Comparison
    label: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The baseline's configuration; all but the arms' group holds for both."""
        return self.baseline.config

    @property
    def difference_ms(self) -> float:
        """Mean over the sessions of the baseline's median step time minus the candidate's."""
        return self.baseline.mean(TPOT) - self.candidate.mean(TPOT)


def latest(observations: Iterable[Observation]) -> list[Observation]:
    """The last attempt at each cell in each session: a sweep that was taken up again tried some more than once."""
    found: dict[tuple[str, int, str], Observation] = {}
    for one in observations:
        place = one.record.sweep_id, one.record.index, one.record.cell_id
        if place not in found or found[place].record.attempt < one.record.attempt:
            found[place] = one
    return [*found.values()]


def cells(observations: Sequence[Observation]) -> list[Measured]:
    """The runs of each cell together; within a cell in the order in which they began."""
    ordered = sorted(observations, key=lambda o: o.record.started_at)
    groups = by_cell(ordered, lambda one: one.record)
    found = [Measured(tuple(group), copy) for (_, copy), group in groups.items()]
    return sorted(found, key=lambda one: place_of(one.config))


def pairs(observations: Sequence[Observation], experiment: ExperimentConfig) -> list[Pair]:
    """The cells that an experiment compares, each two over the sessions in which both have figures.

    An arm is a cell, not a name: an eager step on a static cache and one on a dynamic cache are two baselines, each
    with a pair of its own, and so is a cell on another version of PyTorch.

    Args:
        observations: Runs of the experiment; of other sweeps too, whose sessions are sessions of their own.
        experiment: Names the arms.
    """
    group = experiment.arms
    if group is None:
        return []
    measured = [one for one in cells(observations) if one.ok]
    baselines, candidates = (
        [one for one in measured if one.config[group]["name"] == name]
        for name in (experiment.baseline, experiment.candidate)
    )
    found = []
    for one in baselines:
        for other in candidates:
            if one.copy == other.copy and apart_from(one, group) == apart_from(other, group):
                mine, theirs = _by_session(one), _by_session(other)
                both = [place for place in sorted(mine) if place in theirs]
                if both:
                    baseline, candidate = (
                        Measured(tuple(arm[place] for place in both), one.copy) for arm in (mine, theirs)
                    )
                    ratio = stats.compare(baseline.values(TPOT), candidate.values(TPOT), seed=0)
                    found.append(Pair(baseline, candidate, ratio))
    names = _labels(found, group)
    told = [dataclasses.replace(pair, label=name) for pair, name in zip(found, names, strict=True)]
    return sorted(told, key=lambda pair: _place(pair.config))


def _by_session(one: Measured) -> dict[tuple[str, int], Observation]:
    return {(run.record.sweep_id, run.record.session): run for run in one.ok}


def _labels(found: Sequence[Pair], group: str) -> list[str]:
    """A name for each pair: GPU, model, context, batch, and whatever else tells it from the others."""
    places = []
    for pair in found:
        own, other = tiers(pair.baseline), tiers(pair.candidate)
        theirs = {f"{pair.candidate.config[group]['name']}'s {axis}": v for tier in other for axis, v in tier.items()}
        places.append([{axis: v for axis, v in own[0].items() if axis != group}, *own[1:], theirs])
    axes = [axis for axis in telling(places) if axis not in ("gpu", "model", "context", "batch_size")]
    told = []
    for pair, place in zip(found, places, strict=True):
        c, whole = pair.config, {axis: value for tier in place for axis, value in tier.items()}
        protocol = f"ctx {c['protocol']['context']}, batch {c['protocol']['batch_size']}"
        rest = [f"{axis}={whole.get(axis, '')}" for axis in axes]
        told.append(", ".join([c["gpu"]["name"], c["model"]["name"], protocol, *rest]))
    return told


def without(config: Mapping[str, Any], *dropped: str) -> dict[str, Any]:
    """What decides of a record's configuration, but for some groups or dotted keys."""
    found = what_decides(config)
    for key in dropped:
        group, _, rest = key.partition(".")
        if rest:
            found[group] = {name: value for name, value in found[group].items() if name != rest}
        else:
            found.pop(group, None)
    return found


def apart_from(one: Measured, *dropped: str) -> str:
    """What a cell has in common with those that differ from it in some groups or dotted keys alone."""
    return json.dumps([without(one.config, *dropped), one.device], sort_keys=True)


def same_software(one: Measured, other: Measured) -> bool:
    """Whether two cells ran on the same device, driver and versions of the packages that both need.

    Of two backends, one of which may live in an environment of its own, it is torch that both need.
    """
    mine, theirs = (cell.observations[0].record.environment for cell in (one, other))
    versions, others = mine.get("versions", {}), theirs.get("versions", {})
    drivers = [environment.get("device", {}).get("driver") for environment in (mine, theirs)]
    shared = versions.keys() & others.keys()
    if one.config["backend"]["name"] != other.config["backend"]["name"]:
        shared &= {"torch"}
    return (
        one.device == other.device
        and drivers[0] == drivers[1]
        and all(versions[name] == others[name] for name in shared)
    )


def only(found: Iterable[Measured]) -> Measured | None:
    """The cell that others are set against; `None` where there is none, or no telling which of several."""
    several = [*found]
    return several[0] if len(several) == 1 else None


def _place(config: dict[str, Any]) -> tuple[Any, ...]:
    protocol = config["protocol"]
    return config["model"]["name"], protocol["batch_size"], protocol["context"]

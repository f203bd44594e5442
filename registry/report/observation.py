"""Runs as a report sees them: cells over their sessions, and the pairs that an experiment compares."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from registry import stats
from registry.display import place_of
from registry.outcome import Outcome
from registry.schema import UNTIMED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    """

    record: Record
    run_id: str = ""

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
    """

    observations: tuple[Observation, ...]

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
        """Of the step times, within and across the sessions that have some."""
        return stats.spread([o.record.step_times_ms for o in self.ok])


@dataclass(frozen=True)
class Pair:
    """Two arms of one block over the sessions in which both have figures.

    Attributes:
        baseline: The one arm's runs, session by session.
        candidate: The other arm's, of the same sessions.
        comparison: What they say.
    """

    baseline: Measured
    candidate: Measured
    comparison: stats.Comparison

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
    groups: dict[str, list[Observation]] = {}
    for one in sorted(observations, key=lambda o: o.record.started_at):
        groups.setdefault(_identity(one), []).append(one)
    return sorted((Measured(tuple(group)) for group in groups.values()), key=lambda one: place_of(one.config))


def pairs(observations: Sequence[Observation], experiment: ExperimentConfig) -> list[Pair]:
    """The blocks that an experiment compares, each over the sessions in which both arms have figures.

    Args:
        observations: Runs of the experiment; of other sweeps too, whose sessions are sessions of their own.
        experiment: Names the arms.
    """
    group = experiment.arms
    if group is None:
        return []
    blocks: dict[str, dict[tuple[str, int], dict[str, Observation]]] = {}
    for one in observations:
        if one.record.outcome is not Outcome.OK:
            continue
        arm = one.record.config[group]["name"]
        block = blocks.setdefault(_identity(one, without=group), {})
        block.setdefault((one.record.sweep_id, one.record.session), {})[arm] = one
    found = []
    for sessions in blocks.values():
        both = [
            (arms[experiment.baseline], arms[experiment.candidate])
            for _, arms in sorted(sessions.items())
            if experiment.baseline in arms and experiment.candidate in arms
        ]
        if both:
            baseline, candidate = (Measured(tuple(arm)) for arm in zip(*both, strict=True))
            ratio = stats.compare(baseline.values(TPOT), candidate.values(TPOT), seed=0)
            found.append(Pair(baseline, candidate, ratio))
    return sorted(found, key=lambda pair: _place(pair.config))


def _identity(one: Observation, without: str = "") -> str:
    """What two runs have in common that are sessions of one cell, whatever they were allowed to take."""
    config = {group: part for group, part in one.record.config.items() if group != without}
    config["protocol"] = {key: value for key, value in config["protocol"].items() if key not in UNTIMED}
    return json.dumps([config, one.device], sort_keys=True)


def _place(config: dict[str, Any]) -> tuple[Any, ...]:
    protocol = config["protocol"]
    return config["model"]["name"], protocol["batch_size"], protocol["context"]

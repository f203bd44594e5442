"""Which of our figures stands beside one of the study's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.experiments import matches, value_of
from registry.report.batches import alone, latency, throughput
from registry.report.cost import ladders, lever
from registry.report.labels import named, varying
from registry.report.observation import TPOT, cells
from registry.report.paired import block
from registry.report.variants import plain_eager, speedup
from registry.schema import OVER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from registry.report.cost import Rung
    from registry.report.observation import Measured, Observation, Pair
    from registry.schema import StudyFigure
    from registry.stats import Interval

OF_PAIRS: dict[str, Callable[[Pair], float | None]] = {
    "speedup": lambda pair: pair.comparison.mean,
    "speedup_low": lambda pair: _end(pair.comparison.bootstrap, "low"),
    "speedup_high": lambda pair: _end(pair.comparison.bootstrap, "high"),
    "speedup_least": lambda pair: min(pair.comparison.ratios),
    "speedup_greatest": lambda pair: max(pair.comparison.ratios),
    "speedup_cv": lambda pair: pair.comparison.cv,
    "difference_ms": lambda pair: pair.difference_ms,
    "difference_share": lambda pair: pair.difference_ms / pair.baseline.mean(TPOT),
    "baseline_ms": lambda pair: pair.baseline.mean(TPOT),
    "baseline_cv": lambda pair: pair.baseline.spread.across,
    "candidate_ms": lambda pair: pair.candidate.mean(TPOT),
    "candidate_cv": lambda pair: pair.candidate.spread.across,
}
"""Figures of two arms over the sessions that have both: means of milliseconds, as the study's of section 5 are, its
bootstrap interval, and coefficients of variation of the sessions' medians."""
OF_TWO: dict[str, tuple[Callable[[Measured, Sequence[Measured]], Measured | None], Callable[..., float | None]]] = {
    "latency_over_batch_1": (alone, latency),
    "throughput_over_batch_1": (alone, throughput),
    "speedup_over_plain": (plain_eager, speedup),
}
"""Figures of a cell over another one: which that is, and what is made of both."""
DOLLARS = "usd_per_mtok"
"""A figure of the cheapest cell, at the price by which it is the cheapest."""
DOLLARS_OVER = f"{DOLLARS}_over_"
"""And before the name of a GPU: over the same figure of that."""


@dataclass(frozen=True)
class Ours:
    """What stands beside a figure of the study.

    Attributes:
        value: Ours; `None` where there is none of that cell on that GPU, or no telling which.
        runs: Where it comes from.
        several: Our cells, where the figure could be of more than one.
        cells: Over how many cells of ours it was taken.
        remark: What ours is of, where the study's figure does not say it.
        outcome: How our cells ended, where that is the figure.
    """

    value: float | None = None
    runs: Sequence[Observation] = ()
    several: Sequence[str] = ()
    cells: int = 0
    remark: str = ""
    outcome: str = ""


def ours(
    figure: StudyFigure, observations: Sequence[Observation], pairs: Sequence[Pair], prices: Mapping[str, float]
) -> Ours:
    """Ours beside a figure of the study's."""
    where = {"gpu.name": figure.gpu, **figure.where}
    if figure.metric in OF_PAIRS:
        return _of_pair(figure, [pair for pair in pairs if matches(pair.config, where)])
    if figure.metric.startswith(DOLLARS):
        return _dollars(figure, ladders(observations, prices).values())
    every = cells(observations)
    own = [one for one in every if matches(one.config, where)]
    if figure.outcome:
        return _outcome(figure, own)
    if figure.metric in OF_TWO:
        return _of_two(figure, own, every)
    return _of_cells(figure, [one for one in own if one.values(figure.metric)])


def _of_pair(figure: StudyFigure, found: Sequence[Pair]) -> Ours:
    if len(found) != 1:
        return Ours(several=[block(pair) for pair in found])
    [pair] = found
    return Ours(OF_PAIRS[figure.metric](pair), [*pair.baseline.ok, *pair.candidate.ok], cells=1)


def _end(interval: Interval | None, side: str) -> float | None:
    return getattr(interval, side) if interval else None


def _dollars(figure: StudyFigure, found: Any) -> Ours:
    where = {"gpu.name": figure.gpu, **figure.where}
    rungs = [(ladder, rung) for ladder in found for rung in ladder.values() if matches(rung.cell.config, where)]
    if len(rungs) != 1:
        return Ours(several=[lever(rung.cell) for _, rung in rungs])
    [(ladder, rung)] = rungs
    if figure.metric == DOLLARS:
        return Ours(rung.dollars, rung.cell.ok, cells=1, remark=_pulled(rung))
    other: Rung | None = ladder.get(figure.metric.removeprefix(DOLLARS_OVER))
    if other is None:
        return Ours()
    remark = f"{_pulled(rung)} over {_pulled(other)}"
    return Ours(rung.dollars / other.dollars, [*rung.cell.ok, *other.cell.ok], cells=1, remark=remark)


def _pulled(rung: Rung) -> str:
    return f"{lever(rung.cell)} at {rung.price:.2f} $/h"


def _outcome(figure: StudyFigure, found: Sequence[Measured]) -> Ours:
    """How the cells that a figure describes ended, whatever else tells them apart."""
    ended = Counter(one.outcome for one in found)
    told = next(iter(ended)) if len(ended) == 1 else ", ".join(f"{word} x{count}" for word, count in ended.items())
    runs = [run for one in found for run in one.observations]
    return Ours(runs=runs, cells=len({_choice(one.config, figure) for one in found}), outcome=told)


def _of_two(figure: StudyFigure, own: Sequence[Measured], every: Sequence[Measured]) -> Ours:
    base_of, made = OF_TWO[figure.metric]
    found = [(one, base) for one in own if one.ok and (base := base_of(one, every))]
    if len(found) != 1:
        axes = varying([one for one, _ in found])
        return Ours(several=[named(one, axes) for one, _ in found])
    [(one, base)] = found
    return Ours(made(one, base), [*one.ok, *base.ok], cells=1)


def _of_cells(figure: StudyFigure, found: Sequence[Measured]) -> Ours:
    if not found:
        return Ours()
    if len({_choice(one.config, figure) for one in found}) < len(found):
        axes = varying(found)
        return Ours(several=[named(one, axes) for one in found])
    values = [value for one in found if (value := one.median(figure.metric)) is not None]
    value = OVER[figure.over](values) if figure.over else values[0]
    return Ours(value, [run for one in found for run in one.ok], cells=len(found))


def _choice(config: Mapping[str, Any], figure: StudyFigure) -> tuple[Any, ...]:
    """Which of the cells that a figure describes this is one of."""
    return tuple(value_of(config, key) for key in figure.where)

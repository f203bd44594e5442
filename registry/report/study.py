"""Ours beside the study's: the same cell on the same GPU, or the study's alone where it had no such GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.experiments import matches, places, value_of
from registry.report.cost import ladders, lever
from registry.report.document import Row, Section, Table
from registry.report.labels import named, number, varying
from registry.report.observation import TPOT, cells
from registry.report.paired import block

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from registry.report.observation import Observation, Pair
    from registry.schema import ExperimentConfig, StudyFigure

GPUS = ("h100", "a100-80gb", "l40s", "l4")
"""The study's four (arXiv 2605.30571, section 3.3), whatever an experiment's figures are of."""
OVER: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "median": lambda values: float(np.median(values)),
    "max": max,
}
"""What may be taken over several cells."""
OF_PAIRS: dict[str, Callable[[Pair], float]] = {
    "speedup": lambda pair: pair.comparison.mean,
    "difference_ms": lambda pair: pair.difference_ms,
    "baseline_ms": lambda pair: pair.baseline.mean(TPOT),
    "candidate_ms": lambda pair: pair.candidate.mean(TPOT),
}
"""Figures of two arms, means over the sessions that have both, as the study's of section 5 are."""
DOLLARS = "usd_per_mtok"
"""A figure of the cheapest cell, at the price by which it is the cheapest."""


@dataclass(frozen=True)
class Ours:
    """What stands beside a figure of the study.

    Attributes:
        value: Ours; `None` where there is none of that cell on that GPU, or no telling which.
        runs: Where it comes from.
        several: Our cells, where the figure could be of more than one.
        cells: Over how many cells of ours it was taken.
        remark: What ours is of, where the study's figure does not say it.
    """

    value: float | None = None
    runs: Sequence[Observation] = ()
    several: Sequence[str] = ()
    cells: int = 0
    remark: str = ""


def study(
    observations: Sequence[Observation],
    pairs: Sequence[Pair],
    experiment: ExperimentConfig,
    prices: Mapping[str, float],
) -> list[Section]:
    """Each figure that the study states, ours of the same cell where there is one, and the ratio.

    A figure of one cell that several of ours could be has none of them beside it: which is meant is not for a median
    to say. One over several cells has ours over those of them that there are, with their number, and a ratio over all
    of them alone.
    """
    if not experiment.study:
        return []
    here = {one.record.config["gpu"]["name"] for one in observations}
    theirs = {figure.gpu for figure in experiment.study}
    shared = _shared(experiment.study)
    found = [_ours(figure, observations, pairs, prices) for figure in experiment.study]
    rows = [_row(figure, ours, shared) for figure, ours in zip(experiment.study, found, strict=True)]
    headings = ["study's GPU", "cell", "figure", "stated in", "study", "our cells", "ours", "ours / study"]
    text = [f"Every figure is of {_cell(shared)}."] if shared else []
    if absent := ", ".join(sorted(here - {*GPUS})):
        text.append(f"The study did not have {absent}: its figures stand for comparison, of other GPUs.")
    if untold := ", ".join(sorted((here & {*GPUS}) - theirs)):
        text.append(f"The study had {untold} too, and states none of these figures of it.")
    text += [
        f"Ambiguous, so not compared: {figure.metric} of {figure.gpu}, {_cell(figure.where)}, is that of "
        f"{' and of '.join(ours.several)}."
        for figure, ours in zip(experiment.study, found, strict=True)
        if ours.several
    ]
    text += [
        f"Ours beside the {figure.value:g} {figure.metric} of {figure.gpu} is of {ours.remark}."
        for figure, ours in zip(experiment.study, found, strict=True)
        if ours.remark
    ]
    return [Section("The study's figures", text, [Table(headings, rows, text_columns=4)])]


def _row(figure: StudyFigure, ours: Ours, shared: Mapping[str, Any]) -> Row:
    name = f"{figure.over} {figure.metric}".strip()
    value = ours.value
    ratio = value / figure.value if value is not None and ours.cells == places(figure.where) else None
    count = f"{ours.cells} of {places(figure.where)}" if figure.over else ""
    told = [count, "ambiguous" if ours.several else number(value, 3), number(ratio, 3)]
    own = {key: value for key, value in figure.where.items() if key not in shared}
    return Row([figure.gpu, _cell(own), name, figure.source, f"{figure.value:g}", *told], ours.runs)


def _shared(figures: Sequence[StudyFigure]) -> dict[str, Any]:
    """What all figures are of."""
    return {
        key: value
        for key, value in figures[0].where.items()
        if all(key in figure.where and figure.where[key] == value for figure in figures)
    }


def _cell(where: Mapping[str, Any]) -> str:
    """What figures are of: a group's choice by the group, any other key by its last part."""
    return " ".join(f"{_short(key)}={_told(value)}" for key, value in where.items())


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(key: str) -> str:
    return key.removesuffix(".name") if key.endswith(".name") else key.rpartition(".")[2]


def _ours(
    figure: StudyFigure, observations: Sequence[Observation], pairs: Sequence[Pair], prices: Mapping[str, float]
) -> Ours:
    where = {"gpu.name": figure.gpu, **figure.where}
    if figure.metric in OF_PAIRS:
        blocks = [pair for pair in pairs if matches(pair.config, where)]
        if len(blocks) != 1:
            return Ours(several=[block(pair) for pair in blocks])
        return Ours(OF_PAIRS[figure.metric](blocks[0]), [*blocks[0].baseline.ok, *blocks[0].candidate.ok], cells=1)
    if figure.metric == DOLLARS:
        rungs = [rung for ladder in ladders(observations, prices).values() for rung in ladder.values()]
        rungs = [rung for rung in rungs if matches(rung.cell.config, where)]
        if len(rungs) != 1:
            return Ours(several=[lever(rung.cell) for rung in rungs])
        [rung] = rungs
        return Ours(rung.dollars, rung.cell.ok, cells=1, remark=f"{lever(rung.cell)} at {rung.price:.2f} $/h")
    found = [one for one in cells(observations) if matches(one.config, where) and one.values(figure.metric)]
    values = [value for one in found if (value := one.median(figure.metric)) is not None]
    if not values:
        return Ours()
    if len({_choice(one.config, figure) for one in found}) < len(found):
        axes = varying(found)
        return Ours(several=[named(one, axes) for one in found])
    value = OVER[figure.over](values) if figure.over else values[0]
    return Ours(value, [run for one in found for run in one.ok], cells=len(found))


def _choice(config: Mapping[str, Any], figure: StudyFigure) -> tuple[Any, ...]:
    """Which of the cells that a figure describes this is one of."""
    return tuple(value_of(config, key) for key in figure.where)

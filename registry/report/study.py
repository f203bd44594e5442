"""Ours beside the study's: the same cell on the same GPU, or the study's alone where it had no such GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from registry.experiments import matches
from registry.report.document import Row, Section, Table
from registry.report.labels import number
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from registry.report.observation import Observation, Pair
    from registry.schema import ExperimentConfig, StudyFigure

OVER: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "median": lambda values: float(np.median(values)),
    "max": max,
}
"""What may be taken over several cells."""
OF_PAIRS: dict[str, Callable[[Pair], float]] = {
    "speedup": lambda pair: pair.comparison.mean,
    "difference_ms": lambda pair: pair.difference_ms,
}
"""Figures of two arms."""


def study(observations: Sequence[Observation], pairs: Sequence[Pair], experiment: ExperimentConfig) -> list[Section]:
    """Each figure that the study states, ours of the same cell where there is one, and the ratio."""
    if not experiment.study:
        return []
    here = {one.record.config["gpu"]["name"] for one in observations}
    theirs = {figure.gpu for figure in experiment.study}
    rows = [_row(figure, observations, pairs) for figure in experiment.study]
    headings = ["study's GPU", "cell", "figure", "stated in", "study", "ours", "ours / study"]
    absent = ", ".join(sorted(here - theirs))
    text = [f"The study did not have {absent}: its figures stand for comparison, of other GPUs."] if absent else []
    return [Section("The study's figures", text, [Table(headings, rows, text_columns=4)])]


def _row(figure: StudyFigure, observations: Sequence[Observation], pairs: Sequence[Pair]) -> Row:
    ours, runs = _ours(figure, observations, pairs)
    cell = " ".join(
        f"{key.rpartition('.')[0].partition('.')[0]}={value}"
        if key.endswith(".name")
        else f"{key.rpartition('.')[2]}={value}"
        for key, value in figure.where.items()
    )
    name = figure.metric if figure.over == "median" else f"{figure.over} {figure.metric}"
    told = [number(ours, 3), number(ours / figure.value, 3)] if ours is not None else ["", ""]
    return Row([figure.gpu, cell, name, figure.source, f"{figure.value:g}", *told], runs)


def _short(key: str) -> str:
    """A dotted key as it is typed: a group's name by the group, any other key by its last part."""
    return key.removesuffix(".name") if key.endswith(".name") else key.rpartition(".")[2]


def _ours(
    figure: StudyFigure, observations: Sequence[Observation], pairs: Sequence[Pair]
) -> tuple[float | None, Sequence[Observation]]:
    """Our figure and the runs that it comes from; `None` where there is none of that cell on that GPU."""
    where = {"gpu.name": figure.gpu, **figure.where}
    if figure.metric in OF_PAIRS:
        for pair in pairs:
            if matches(pair.config, where):
                return OF_PAIRS[figure.metric](pair), [*pair.baseline.ok, *pair.candidate.ok]
        return None, ()
    found = [one for one in cells(observations) if matches(one.config, where) and one.values(figure.metric)]
    values = [value for one in found if (value := one.median(figure.metric)) is not None]
    if not values:
        return None, ()
    return OVER[figure.over](values), [run for one in found for run in one.ok]

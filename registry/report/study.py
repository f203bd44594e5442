"""Ours beside the study's: the same cell on the same GPU, or the study's alone where it had no such GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.experiments import places
from registry.report.document import Row, Section, Table
from registry.report.labels import number
from registry.report.ours import ours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.report.observation import Observation, Pair
    from registry.report.ours import Ours
    from registry.schema import ExperimentConfig, StudyFigure

GPUS = ("h100", "a100-80gb", "l40s", "l4")
"""The study's four (arXiv 2605.30571, section 3.3), whatever an experiment's figures are of."""
SMALL = 0.1
"""Below it three decimals would leave too little of a figure."""
SAME, OTHER = "same", "other"
"""What stands in a ratio's place where the figure is an outcome."""


def study(
    observations: Sequence[Observation],
    pairs: Sequence[Pair],
    experiment: ExperimentConfig,
    prices: Mapping[str, float],
) -> list[Section]:
    """Each figure that the study states, ours of the same cell where there is one, and the ratio.

    A figure of one cell that several of ours could be has none of them beside it: which is meant is not for a median
    to say. One over several cells has ours over those of them that there are, with their number, and a ratio over as
    many as the study's alone.
    """
    if not experiment.study:
        return []
    here = {one.record.config["gpu"]["name"] for one in observations}
    theirs = {figure.gpu for figure in experiment.study}
    shared = _shared(experiment.study)
    found = [ours(figure, observations, pairs, prices) for figure in experiment.study]
    rows = [_row(figure, own, shared) for figure, own in zip(experiment.study, found, strict=True)]
    headings = ["study's GPU", "cell", "figure", "stated in", "study", "our cells", "ours", "ours / study"]
    text = [f"Every figure is of {_cell(shared)}."] if shared else []
    if absent := ", ".join(sorted(here - {*GPUS})):
        text.append(f"The study did not have {absent}: its figures stand for comparison, of other GPUs.")
    if untold := ", ".join(sorted((here & {*GPUS}) - theirs)):
        text.append(f"The study had {untold} too, and states none of these figures of it.")
    text += [
        f"Ambiguous, so not compared: {_name(figure)} of {figure.gpu}, {_cell(figure.where)}, is that of "
        f"{' and of '.join(own.several)}."
        for figure, own in zip(experiment.study, found, strict=True)
        if own.several
    ]
    text += [
        f"Ours beside the {figure.value:g} {figure.metric} of {figure.gpu} is of {own.remark}."
        for figure, own in zip(experiment.study, found, strict=True)
        if own.remark
    ]
    return [Section("The study's figures", text, [Table(headings, rows, text_columns=4)])]


def _row(figure: StudyFigure, own: Ours, shared: Mapping[str, Any]) -> Row:
    described = places(figure.where)
    whole = own.cells == (figure.cells or described)
    count = f"{own.cells} of {described}" if described > 1 else ""
    if figure.cells:
        count += f", the study's {figure.cells}"
    if figure.outcome:
        same = SAME if own.outcome == figure.outcome else OTHER
        told = [figure.outcome, count, own.outcome, same if own.runs and (whole or same == OTHER) else ""]
    else:
        assert figure.value is not None  # registry.validate asks for it where there is no outcome
        ratio = own.value / figure.value if own.value is not None and whole else None
        told = [f"{figure.value:g}", count, "ambiguous" if own.several else _figure(own.value), number(ratio, 3)]
    rest = {key: value for key, value in figure.where.items() if key not in shared}
    return Row([figure.gpu, _cell(rest), _name(figure), figure.source, *told], own.runs)


def _figure(value: float | None) -> str:
    return number(value, 3 if value is None or abs(value) >= SMALL else 5)


def _name(figure: StudyFigure) -> str:
    return "outcome" if figure.outcome else f"{figure.over} {figure.metric}".strip()


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

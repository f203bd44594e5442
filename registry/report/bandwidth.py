"""How near each cell comes to the memory's rate by what it really streams: the spec sheet's, and the one measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.floor import GB
from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, percent, varying
from registry.report.observation import TPOT, cells
from registry.report.pieces import bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

STREAMED = "streamed_bytes"
FIGURES = (
    ("TPOT ms", TPOT, 1.0, 3),
    ("streamed GB", STREAMED, GB, 3),
    ("mbu", "mbu", 1.0, 3),
    ("mbu att.", "mbu_attainable", 1.0, 3),
    ("r_floor", "r_floor", 1.0, 3),
)
"""Heading, metric, what it is divided by, decimals. None of these can be spared: they are what the section is for."""
SPREAD = ("within", "across")
"""Behind the step's time; a narrow window goes without."""
MEANING = (
    "r_floor counts by the study's convention: every parameter at the format's study_bits, an input embedding of "
    "which a step reads one row included, and no scales; mbu and mbu att. count what a step streams as it is stored, "
    "the cache with it, over the spec sheet's bandwidth and over the read bandwidth that each process measured. "
    "within and across are coefficients of variation of step times in a session and of the sessions' medians."
)


def bandwidth(observations: Sequence[Observation]) -> list[Section]:
    """One row a measured cell: the bytes that its step streams, and which fraction of the memory's rate that is."""
    found = [one for one in cells(observations) if one.ok]
    if not found:
        return []
    axes = varying(found)
    step, *others = (heading for heading, *_ in FIGURES)
    table = Table([*axes, step, *SPREAD, *others], [_row(one, axes) for one in found], len(axes), SPREAD)
    return [Section("Bandwidth", [MEANING], [table], lambda: _drawn(found, axes), True)]


def _row(one: Measured, axes: Sequence[str]) -> Row:
    values = [(one.median(metric), unit, digits) for _, metric, unit, digits in FIGURES]
    step, *others = (number(None if value is None else value / unit, digits) for value, unit, digits in values)
    spread = [percent(one.spread.within), percent(one.spread.across)]
    return Row([*label(one, axes), step, *spread, *others], one.ok)


def _drawn(found: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    names = [named(one, axes) for one in found]
    figure = go.Figure()
    for name, metric, color in (("mbu att.", "mbu_attainable", "#3465a4"), ("mbu", "mbu", "#a8c0e0")):
        figure.add_trace(bars(found, names, metric, name, color))
    figure.update_layout(
        title="bytes streamed over time: fraction of the read rate measured, and of the spec sheet's",
        xaxis={"title": "fraction", "rangemode": "tozero"},
        barmode="group",
        height=140 + 44 * len(found),
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return [figure]

"""Everything that was timed in every run: what a median does not show."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, varying
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from registry.record import Record
    from registry.report.observation import Measured, Observation

SHARES = (("min", 0.0), ("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("max", 1.0))
"""Heading and quantile."""
COLORS = ("#3465a4", "#c17d11")
"""Of the strips of a cell, in turn."""


@dataclass(frozen=True)
class Timed:
    """What a kind of run times.

    Attributes:
        name: Of one.
        unit: Its times'.
        whole: The same in words.
        times: A run's.
    """

    name: str
    unit: str
    whole: str
    times: Callable[[Record], Sequence[float]]


KINDS = (
    Timed("step", "ms", "Milliseconds", lambda record: record.step_times_ms),
    Timed("call", "us", "Microseconds", lambda record: record.call_times_us),
)


def steps(observations: Sequence[Observation]) -> list[Section]:
    """A strip of step times for each run, and one of call times for each run of an attention kernel alone."""
    found = []
    for kind in KINDS:
        if own := cells([one for one in observations if kind.times(one.record)]):
            found.append(_section(kind, own))
    return found


def _section(kind: Timed, found: Sequence[Measured]) -> Section:
    axes = varying(found)
    rows = [_row(kind, one, run, axes) for one in found for run in one.ok]
    table = Table([*axes, "session", f"{kind.name}s", *(name for name, _ in SHARES)], rows, len(axes) + 1)
    text = (
        f"{kind.whole}, quantiles of each run's measured {kind.name}s. A point of the picture is a {kind.name}, a "
        "strip a run: those of a cell lie together, the first session on top."
    )
    return Section(f"{kind.name.capitalize()} times", (text,), [table], lambda: _strips(kind, found, axes))


def _row(kind: Timed, one: Measured, run: Observation, axes: Sequence[str]) -> Row:
    times = kind.times(run.record)
    figures = [number(float(np.quantile(times, share)), 3) for _, share in SHARES]
    return Row([*label(one, axes), str(run.record.session), str(len(times)), *figures], [run])


def _strips(kind: Timed, found: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    figure = go.Figure()
    middles: dict[float, str] = {}
    line = count()
    for one in found:
        places = []
        for turn, run in enumerate(one.ok):
            places.append(next(line))
            figure.add_trace(
                go.Box(
                    x=[round(time, 4) for time in kind.times(run.record)],
                    y0=places[-1],
                    orientation="h",
                    width=0.8,
                    boxpoints="all",
                    pointpos=0,
                    jitter=0.8,
                    fillcolor="rgba(0,0,0,0)",
                    line={"color": "rgba(0,0,0,0)"},
                    marker={"size": 3, "opacity": 0.55, "color": COLORS[turn % len(COLORS)]},
                    hovertext=f"session {run.record.session}, run {run.trace}",
                )
            )
        if places:
            middles[(places[0] + places[-1]) / 2] = named(one, axes)
        next(line)  # room between two cells
    figure.update_layout(xaxis_title=f"{kind.name} time, {kind.unit}", showlegend=False, height=170 + 14 * next(line))
    figure.update_yaxes(tickvals=[*middles], ticktext=[*middles.values()], autorange="reversed", automargin=True)
    return [figure]

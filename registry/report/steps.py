"""Every measured step of every run: what a median does not show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, varying
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

SHARES = (("min", 0.0), ("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("max", 1.0))
"""Heading and quantile."""


def steps(observations: Sequence[Observation]) -> list[Section]:
    """A strip of step times for each run."""
    found = cells([one for one in observations if one.record.step_times_ms])
    if not found:
        return []
    axes = varying(found)
    rows = [_row(one, run, axes) for one in found for run in one.ok]
    table = Table([*axes, "session", "steps", *(name for name, _ in SHARES)], rows, len(axes) + 1)
    text = "Milliseconds, quantiles of each run's measured steps. A point of the picture is a step, a strip a cell."
    return [Section("Step times", (text,), [table], lambda: _strips(found, axes))]


def _row(one: Measured, run: Observation, axes: Sequence[str]) -> Row:
    times = run.record.step_times_ms
    figures = [number(float(np.quantile(times, share)), 3) for _, share in SHARES]
    return Row([*label(one, axes), str(run.record.session), str(len(times)), *figures], [run])


def _strips(found: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    figure = go.Figure()
    for one in found:
        name = named(one, axes)
        times = [(time, run) for run in one.ok for time in run.record.step_times_ms]
        figure.add_trace(
            go.Box(
                x=[time for time, _ in times],
                name=name,
                boxpoints="all",
                pointpos=0,
                jitter=0.6,
                fillcolor="rgba(0,0,0,0)",
                line={"color": "rgba(0,0,0,0)"},
                marker={"size": 4, "opacity": 0.55, "color": "#3465a4"},
                hovertext=[f"session {run.record.session}, run {run.trace}" for _, run in times],
            )
        )
    figure.update_layout(xaxis_title="step time, ms", showlegend=False, height=170 + 34 * len(found))
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    return [figure]

"""Every measured step of every run: what a median does not show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.report.document import Section
from registry.report.labels import named, varying
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Observation


def steps(observations: Sequence[Observation]) -> list[Section]:
    """A strip of step times for each run."""
    if not any(one.record.step_times_ms for one in observations):
        return []
    return [
        Section(
            "Step times",
            ("One point a measured step; the sessions of a cell share a strip.",),
            (),
            lambda: _strips(observations),
        )
    ]


def _strips(observations: Sequence[Observation]) -> list[Any]:
    from plotly import graph_objects as go

    found = cells([one for one in observations if one.record.step_times_ms])
    axes = varying(found)
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

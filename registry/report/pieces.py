"""Parts that several reports have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from registry.alike import as_one, words
from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, varying
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation


def not_measured(observations: Sequence[Observation]) -> list[Section]:
    """Why sessions of cells have no figures; no section where all have."""
    found = cells(observations)
    axes = varying(found) if found else []
    rows = [Row([*label(one, axes), one.outcome, one.reason], one.observations) for one in found if one.reason]
    return [Section("Not measured", (), [Table([*axes, "outcome", "why"], rows, len(axes) + 2)])] if rows else []


def weakened(observations: Sequence[Observation]) -> list[Section]:
    """What the records warn of, each once with its cells; no section where none does.

    Warnings that differ in their numbers alone are one, with the least and the greatest of each.

    Args:
        observations: Runs that a report has figures of.
    """
    found = cells(observations)
    axes = varying(found) if found else []
    told: dict[tuple[str, ...], list[tuple[str, str, Observation]]] = {}
    for one in found:
        cell = named(one, axes)
        for run in one.observations:
            for warning in run.record.warnings:
                told.setdefault(words(warning), []).append((warning, cell, run))
    rows = []
    for those in told.values():
        warnings, its_cells, runs = zip(*those, strict=True)
        rows.append(Row([as_one(warnings), "; ".join(dict.fromkeys(its_cells))], runs))
    return [Section("What weakens it", (), [Table(["warning", "cells"], rows, 2)])] if rows else []


def bars(found: Sequence[Measured], names: Sequence[str], metric: str, name: str, color: str) -> Any:
    """A Plotly bar for each cell: the median over the sessions, with the least and the greatest of them.

    Args:
        found: Cells with figures.
        names: Theirs, in the same order.
        metric: What is drawn.
        name: Of all these bars.
        color: As CSS writes it.
    """
    from plotly import graph_objects as go

    return go.Bar(**_reaching(found, names, metric, name), orientation="h", marker={"color": color})


def points(found: Sequence[Measured], names: Sequence[str], metric: str, name: str, color: str) -> Any:
    """The same as points, for a logarithmic axis, on which a bar's length means nothing."""
    from plotly import graph_objects as go

    return go.Scatter(**_reaching(found, names, metric, name), mode="markers", marker={"color": color, "size": 11})


def _reaching(found: Sequence[Measured], names: Sequence[str], metric: str, name: str) -> dict[str, Any]:
    middle = [one.median(metric) or 0.0 for one in found]
    over = [max(one.values(metric)) - value for one, value in zip(found, middle, strict=True)]
    under = [value - min(one.values(metric)) for one, value in zip(found, middle, strict=True)]
    reach = {"type": "data", "symmetric": False, "array": over, "arrayminus": under}
    return {"y": names, "x": middle, "name": name, "error_x": reach, "hovertext": [one.traces for one in found]}


def log_axis(title: str, figure: Any) -> dict[str, Any]:
    """A logarithmic axis with a tick at each 1, 2 and 5 that a figure's points reach, written out.

    Args:
        title: The axis's.
        figure: Plotly's, whose points are on it.
    """
    values = [value for trace in figure.data for value in trace.x if value > 0]
    if not values:
        return {"title": title, "type": "log"}
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return {"title": title, "type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}

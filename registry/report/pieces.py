"""Parts that several reports have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.report.document import Row, Section, Table
from registry.report.labels import label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured


def not_measured(found: Sequence[Measured], axes: Sequence[str]) -> list[Section]:
    """Why cells have no figures; no section where all have."""
    rows = [Row([*label(one, axes), one.outcome, one.reason], one.observations) for one in found if one.reason]
    return [Section("Not measured", (), [Table([*axes, "outcome", "why"], rows, len(axes) + 2)])] if rows else []


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

    middle = [one.median(metric) or 0.0 for one in found]
    over = [max(one.values(metric)) - value for one, value in zip(found, middle, strict=True)]
    under = [value - min(one.values(metric)) for one, value in zip(found, middle, strict=True)]
    reach = {"type": "data", "symmetric": False, "array": over, "arrayminus": under}
    return go.Bar(y=names, x=middle, name=name, orientation="h", error_x=reach, marker={"color": color})

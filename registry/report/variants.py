"""Runtimes, kernels or launches beside each other on one model and context: the study's sections 6 and 7."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.kernels import short
from registry.report.cost import dollars
from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, percent, varying
from registry.report.observation import AGAIN, PLAIN, TPOT, apart_from, cells, only, same_software
from registry.report.pieces import bars

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.report.observation import Measured, Observation

FIGURES = (
    ("r_floor", "r_floor", 3),
    ("mbu", "mbu", 3),
    ("decode peak GB", "decode_peak_memory_gb", 2),
    ("peak GB", "peak_memory_gb", 2),
)
SPARE = (
    "peak GB",
    "decode peak GB",
    "across",
    "within",
    "mbu",
    "range",
    "$/Mtok",
    "speedup again",
    "again ms",
    "compile s",
)
COMPILED = "compile s"
TOLD = 4
"""Kernels that a row names."""


def variants(observations: Sequence[Observation], prices: Mapping[str, float]) -> list[Section]:
    """One row a cell with its speedup over the plain one, and bars of step times.

    Args:
        observations: Of decode steps.
        prices: Dollars an hour by GPU profile.
    """
    found = cells(observations)
    axes = varying(found)
    headings = [*axes, "outcome", "n", "TPOT ms", "range", "within", "across", "speedup", "over eager"]
    headings += ["again ms", "speedup again", *(heading for heading, *_ in FIGURES), "$/Mtok"]
    headings += [COMPILED] if (compiled := any(one.values("compile_s") for one in found)) else []
    rows = [_row(one, axes, found, prices, compiled) for one in found]
    kernels = Table(
        [*axes, "kernels of a step"],
        [Row([*label(one, axes), _kernels(one)], one.ok[-1:]) for one in found if one.ok],
        text_columns=len(axes) + 1,
    )
    text = (
        "TPOT is the median over the sessions of each one's median step time, range their least and greatest; the "
        "speedup is that of the median over the one plain cell of the same model, protocol and execution "
        f"({', '.join(f'{axis}={name}' for axis, name in PLAIN.items())}); a runtime with an environment of its own "
        "is set against that of rfloor's on the same torch. over eager is the same over the plain eager cell, "
        "whatever the row's execution. again walks the same positions a second time: what it is faster by was paid "
        "once a cache length.",
    )
    return [
        Section("Cells", text, [Table(headings, rows, len(axes) + 1, SPARE)], lambda: _bars(found, axes), True),
        Section("Kernels", ("Seen by torch.profiler in a step of its own after the timing.",), [kernels]),
    ]


def _row(
    one: Measured, axes: Sequence[str], found: Sequence[Measured], prices: Mapping[str, float], compiled: bool
) -> Row:
    runs = f"{len(one.ok)}/{len(one.observations)}"
    times = one.values(TPOT)
    if not times:
        return Row([*label(one, axes), one.outcome, runs, *[""] * (9 + len(FIGURES) + compiled)], one.observations)
    plain = _plain(one, found)
    cells = [number(one.median(TPOT), 2), f"{min(times):.2f}-{max(times):.2f}"]
    cells += [percent(one.spread.within), percent(one.spread.across)]
    cells += [number(speedup(one, plain), 2), number(speedup(one, plain_eager(one, found)), 2)]
    cells += [number(one.median(AGAIN), 2), number(speedup(one, plain, AGAIN), 2)]
    cells += [number(one.median(metric), digits) for _, metric, digits in FIGURES]
    cells += [number(dollars(one, prices), 2), *([number(one.median("compile_s"), 1)] if compiled else [])]
    return Row([*label(one, axes), one.outcome, runs, *cells], one.observations)


def _plain(one: Measured, found: Sequence[Measured], *others: str) -> Measured | None:
    """The one plain cell that differs from another in no group beside the plain cell's own and some others."""
    own = apart_from(one, *PLAIN, *others)
    return only(
        other
        for other in found
        if all(other.config[axis]["name"] == name for axis, name in PLAIN.items())
        and same_software(other, one)
        and apart_from(other, *PLAIN, *others) == own
    )


def plain_eager(one: Measured, found: Sequence[Measured]) -> Measured | None:
    """The one plain eager cell of the same model and protocol."""
    return _plain(one, [other for other in found if other.config["execution"]["name"] == "eager"], "execution")


def speedup(one: Measured, base: Measured | None, metric: str = TPOT) -> float | None:
    """By what a cell is faster than another."""
    theirs, mine = base.median(metric) if base else None, one.median(metric)
    return theirs / mine if theirs and mine else None


def _kernels(one: Measured) -> str:
    seen = short(one.ok[-1].record.measured.get("kernels", {}))
    rest = sum(seen.values()) - sum([*seen.values()][:TOLD])
    told = ", ".join(f"{name} x{count}" for name, count in [*seen.items()][:TOLD])
    return f"{told}, {rest} others" if rest else told


def _bars(found: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    measured = [one for one in found if one.ok]
    names = [named(one, axes) for one in measured]
    figure = go.Figure()
    for name, metric, color in (("first visit", TPOT, "#3465a4"), ("again", AGAIN, "#a8c0e0")):
        figure.add_trace(bars(measured, names, metric, name, color))
    floors = [one.median("floor_ms") for one in measured]
    figure.add_trace(
        go.Scatter(
            y=names,
            x=floors,
            name="floor",
            mode="markers",
            hovertext=[one.traces for one in measured],
            marker={"symbol": "line-ns-open", "color": "#cc0000", "size": 16},
        )
    )
    figure.update_layout(
        title="median step time, least and greatest session",
        xaxis_title="ms",
        barmode="group",
        height=140 + 44 * len(measured),
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return [figure]

"""Every cell with its floor, and each GPU's R_floor over them: the study's section 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, percent, varying
from registry.report.observation import AGAIN, TPOT, cells
from registry.schema import OVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

RATIO = "r_floor"
FIGURES = (
    ("TPOT ms", TPOT, 2),
    ("again ms", AGAIN, 2),
    ("floor ms", "floor_ms", 3),
    ("r_floor", "r_floor", 3),
    ("mbu", "mbu", 3),
    ("decode peak GB", "decode_peak_memory_gb", 2),
)
AGAIN_IS = (
    "again is the floor over the second visit's step, which no longer pays what is paid once a cache length (a "
    "kernel library's planning)."
)
SPARE = ("decode peak GB", "within", "across", "again ms", "mbu")


def matrix(observations: Sequence[Observation]) -> list[Section]:
    """One row a cell, one row a GPU, and a heat map of models over contexts."""
    found = cells(observations)
    axes = varying(found)
    headings = [*axes, "outcome", "n", *(heading for heading, *_ in FIGURES), "within", "across"]
    table = Table(headings, [_row(one, axes) for one in found], text_columns=len(axes) + 1, spare=SPARE)
    kinds = ["gpu", *(axis for axis in axes if axis not in ("gpu", "model", "context"))]
    named_kinds = ["GPU" if kind == "gpu" else kind for kind in kinds]
    distribution = Table(
        [*named_kinds, "cells", *OVER, *(f"again {each}" for each in OVER)],
        [_distribution(names, own) for names, own in _by_kind(found, kinds)],
        text_columns=len(kinds),
    )
    text = [
        "TPOT is the median over the sessions of each one's median step time; within and across are coefficients of "
        "variation of step times in a session and of the sessions' medians. again is the same positions walked a "
        "second time.",
    ]
    return [
        Section("Cells", text, [table], lambda: _heat(found, kinds), True),
        Section("R_floor of each GPU", [AGAIN_IS], [distribution], on_terminal=True),
    ]


def _row(one: Measured, axes: Sequence[str]) -> Row:
    figures = [number(one.median(metric), digits) for _, metric, digits in FIGURES]
    spread = one.spread if one.ok else None
    spreads = [percent(spread.within), percent(spread.across)] if spread else ["", ""]
    return Row(
        [*label(one, axes), one.outcome, f"{len(one.ok)}/{len(one.observations)}", *figures, *spreads],
        one.observations,
    )


def _by_kind(found: Sequence[Measured], kinds: Sequence[str]) -> list[tuple[list[str], list[Measured]]]:
    """The measured cells that differ in model and context alone."""
    groups: dict[tuple[str, ...], list[Measured]] = {}
    for one in found:
        if one.median(RATIO) is not None:
            groups.setdefault(tuple(label(one, kinds)), []).append(one)
    return [([*names], own) for names, own in groups.items()]


def _distribution(names: Sequence[str], own: Sequence[Measured]) -> Row:
    first = [ratio for one in own if (ratio := one.median(RATIO)) is not None]
    again = [one.mean("floor_ms") / step for one in own if (step := one.median(AGAIN)) is not None]
    figures = [number(of(each), 3) if each else "" for each in (first, again) for of in OVER.values()]
    return Row([*names, str(len(first)), *figures], [run for one in own for run in one.ok])


def _heat(found: Sequence[Measured], kinds: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    figures = []
    greatest = max((ratio for one in found if (ratio := one.median(RATIO)) is not None), default=1.0)
    for _, own in _by_kind(found, kinds):
        models = list(dict.fromkeys(one.config["model"]["name"] for one in own))
        contexts = sorted({one.config["protocol"]["context"] for one in own})
        at = {(one.config["model"]["name"], one.config["protocol"]["context"]): one for one in own}
        places = [[at.get((model, context)) for context in contexts] for model in models]
        values = [[one.median(RATIO) if one else None for one in row] for row in places]
        if values:
            figure = go.Figure(
                go.Heatmap(
                    z=values,
                    x=[str(context) for context in contexts],
                    y=models,
                    zmin=0,
                    zmax=greatest,
                    colorscale="Viridis",
                    texttemplate="%{z:.3f}",
                    customdata=[[one.traces if one else "" for one in row] for row in places],
                    hovertemplate="%{y}, context %{x}: r_floor %{z:.4f}<br>%{customdata}<extra></extra>",
                    colorbar={"title": "r_floor"},
                )
            )
            figure.update_layout(
                title=f"r_floor on {named(own[0], kinds)}",
                xaxis_title="context, tokens",
                height=190 + 60 * len(models),
            )
            figure.update_yaxes(autorange="reversed")  # in the table's order
            figures.append(figure)
    return figures

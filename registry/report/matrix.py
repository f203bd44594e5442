"""Every cell with its floor, and each GPU's R_floor over them: the study's section 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from registry.report.document import Row, Section, Table
from registry.report.labels import label, number, percent, varying
from registry.report.observation import TPOT, cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

FIGURES = (
    ("TPOT ms", TPOT, 2),
    ("again ms", "revisit_median_tpot_ms", 2),
    ("floor ms", "floor_ms", 3),
    ("r_floor", "r_floor", 3),
    ("mbu", "mbu", 3),
    ("decode peak GB", "decode_peak_memory_gb", 2),
)


def matrix(observations: Sequence[Observation]) -> list[Section]:
    """One row a cell, one row a GPU, and a heat map of models over contexts."""
    found = cells(observations)
    axes = varying(found)
    headings = [*axes, "outcome", "n", *(heading for heading, *_ in FIGURES), "within", "across"]
    table = Table(headings, [_row(one, axes) for one in found], text_columns=len(axes) + 1)
    distribution = Table(
        ["GPU", "cells", "min", "median", "max"],
        [_distribution(gpu, ratios, runs) for gpu, ratios, runs in _by_gpu(found)],
    )
    text = [
        "TPOT is the median over the sessions of each one's median step time; within and across are coefficients of "
        "variation of step times in a session and of the sessions' medians. again is the same positions walked a "
        "second time.",
    ]
    return [
        Section("Cells", text, [table], lambda: _heat(found)),
        Section("R_floor of each GPU", (), [distribution]),
    ]


def _row(one: Measured, axes: Sequence[str]) -> Row:
    figures = [number(one.median(metric), digits) for _, metric, digits in FIGURES]
    spread = one.spread if one.ok else None
    spreads = [percent(spread.within), percent(spread.across)] if spread else ["", ""]
    return Row(
        [*label(one, axes), one.outcome, f"{len(one.ok)}/{len(one.observations)}", *figures, *spreads],
        one.observations,
    )


def _by_gpu(found: Sequence[Measured]) -> list[tuple[str, list[float], list[Observation]]]:
    groups: dict[str, tuple[list[float], list[Observation]]] = {}
    for one in found:
        ratio = one.median("r_floor")
        if ratio is not None:
            ratios, runs = groups.setdefault(one.config["gpu"]["name"], ([], []))
            ratios.append(ratio)
            runs.extend(one.ok)
    return [(gpu, *group) for gpu, group in groups.items()]


def _distribution(gpu: str, ratios: Sequence[float], runs: Sequence[Observation]) -> Row:
    three = (min(ratios), float(np.median(ratios)), max(ratios))
    return Row([gpu, str(len(ratios)), *(number(ratio, 3) for ratio in three)], runs)


def _heat(found: Sequence[Measured]) -> list[Any]:
    from plotly import graph_objects as go

    figures = []
    for gpu in dict.fromkeys(one.config["gpu"]["name"] for one in found):
        own = [one for one in found if one.config["gpu"]["name"] == gpu and one.ok]
        models = list(dict.fromkeys(one.config["model"]["name"] for one in own))
        contexts = sorted({one.config["protocol"]["context"] for one in own})
        ratio = {
            (one.config["model"]["name"], one.config["protocol"]["context"]): one.median("r_floor") for one in own
        }
        values = [[ratio.get((model, context)) for context in contexts] for model in models]
        if values:
            figure = go.Figure(
                go.Heatmap(
                    z=values,
                    x=[str(context) for context in contexts],
                    y=models,
                    zmin=0,
                    zmax=1,
                    colorscale="Viridis",
                    texttemplate="%{z:.3f}",
                    hovertemplate="%{y}, context %{x}: r_floor %{z:.4f}<extra></extra>",
                    colorbar={"title": "r_floor"},
                )
            )
            figure.update_layout(
                title=f"r_floor on {gpu}", xaxis_title="context, tokens", height=190 + 60 * len(models)
            )
            figures.append(figure)
    return figures

"""What a million tokens cost on each GPU with its best lever: the study's inverted ladder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry import floor
from registry.display import AXES
from registry.report.document import Row, Section, Table
from registry.report.labels import label, number, percent, tiers, varying
from registry.report.observation import TPOT, Measured, cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.report.observation import Observation


@dataclass(frozen=True)
class Rung:
    """A GPU's cheapest cell of a workload.

    Attributes:
        cell: The cell.
        price: Dollars an hour of its GPU.
        dollars: A million tokens.
    """

    cell: Measured
    price: float
    dollars: float


Workload = tuple[str, int, int]
"""Model, context and batch."""
WORKLOAD = ("model", "context", "batch_size", "gpu")
"""Axes that have columns of their own."""


def ladders(observations: Sequence[Observation], prices: Mapping[str, float]) -> dict[Workload, dict[str, Rung]]:
    """For each model, context and batch the cheapest lever of each GPU that has a price.

    Args:
        observations: Any runs; only measured steps count.
        prices: Dollars an hour by GPU profile.
    """
    found: dict[Workload, dict[str, Rung]] = {}
    for one in _levers(_priced(observations, prices)):
        gpu, price = one.config["gpu"]["name"], dollars(one, prices)
        ladder = found.setdefault(_workload(one), {})
        if price is not None and (gpu not in ladder or price < ladder[gpu].dollars):
            ladder[gpu] = Rung(one, prices[gpu], price)
    return found


def dollars(one: Measured, prices: Mapping[str, float]) -> float | None:
    """What a million tokens of a cell cost; `None` without a measured step or a price."""
    step, price = one.median(TPOT), prices.get(one.config["gpu"]["name"])
    return floor.usd_per_mtok(step, price, one.config["protocol"]["batch_size"]) if step and price else None


def _priced(observations: Sequence[Observation], prices: Mapping[str, float]) -> list[Measured]:
    steps = cells([one for one in observations if one.record.kind == "step"])
    return [one for one in steps if one.ok and one.config["gpu"]["name"] in prices]


def _levers(found: Sequence[Measured]) -> list[Measured]:
    """Of each lever the cell with the most sessions, of several such the latest.

    Other code or other packages make another cell of the same lever. The cheapest of these would be the least of
    several draws of one noise, and the lower the more often somebody measured.
    """
    levers: dict[str, list[list[Measured]]] = {}
    for one in found:
        alike = levers.setdefault(json.dumps([tiers(one)[0], one.device], sort_keys=True), [])
        own = next((cells_ for cells_ in alike if all(_same_values(one, other) for other in cells_)), None)
        if own is None:
            alike.append([one])
        else:
            own.append(one)
    return [max(own, key=_weight) for alike in levers.values() for own in alike]


def _same_values(one: Measured, other: Measured) -> bool:
    """Whether two configurations agree in all that both know; an older version lacks some keys."""
    mine, theirs = tiers(one)[1], tiers(other)[1]
    return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())


def _weight(one: Measured) -> tuple[int, str]:
    return len(one.ok), one.ok[-1].record.started_at


def cost(observations: Sequence[Observation], prices: Mapping[str, float]) -> list[Section]:
    """For each model, context and batch the cheapest cell of each GPU, the cheapest GPU first.

    Args:
        observations: Any runs; only steps that were measured on a GPU with a price count.
        prices: Dollars an hour by GPU profile.
    """
    priced, best = _priced(observations, prices), ladders(observations, prices)
    told = varying([rung.cell for ladder in best.values() for rung in ladder.values()])
    axes = [axis for axis in varying(priced) if (axis in AXES or axis in told) and axis not in WORKLOAD]
    headings = ["model", "context", "batch", "GPU", *axes, "$/h", "TPOT ms", "within", "across"]
    headings += ["$/Mtok", "times the cheapest"]
    rows = [row for workload, ladder in sorted(best.items()) for row in _rows(workload, ladder, axes)]
    unpriced = sorted(
        {one.record.config["gpu"]["name"] for one in observations} - {one.config["gpu"]["name"] for one in priced}
    )
    text = [
        "Price an hour x median step time / batch, over the cells on record; idle time, network and storage are "
        "left out. A lever that several versions of code or packages measured counts by the one with the most "
        "sessions, of equals the latest. A GPU's price is the one given, else that of its newest record, with its "
        "source there. within and across are coefficients of variation of the steps in a session and of the "
        "sessions' medians.",
    ]
    if unpriced:
        text.append(
            f"Without a measured step and a price: {', '.join(unpriced)}; price.GPU=DOLLARS_AN_HOUR gives one."
        )
    table = Table(headings, rows, text_columns=4 + len(axes), spare=("within", "across"))
    return [Section("$/Mtok with the best lever of each GPU", text, [table], lambda: _ladder(best), True)]


def _workload(one: Measured) -> Workload:
    protocol = one.config["protocol"]
    return one.config["model"]["name"], protocol["context"], protocol["batch_size"]


def lever(one: Measured) -> str:
    """What was pulled to make a step cheap, in a few words."""
    return " ".join(one.config[axis]["name"] for axis in ("backend", "quant", "attention", "execution"))


def _rows(workload: Workload, ladder: Mapping[str, Rung], axes: Sequence[str]) -> list[Row]:
    ranked = sorted(ladder.items(), key=lambda item: item[1].dollars)
    least = ranked[0][1].dollars
    model, context, batch = workload
    return [
        Row(
            [
                *(model, str(context), str(batch), gpu, *label(rung.cell, axes)),
                *(number(rung.price, 2), number(rung.cell.median(TPOT), 2)),
                *(percent(rung.cell.spread.within), percent(rung.cell.spread.across)),
                *(number(rung.dollars, 2), f"{rung.dollars / least:.2f}"),
            ],
            rung.cell.ok,
        )
        for gpu, rung in ranked
    ]


def _ladder(best: Mapping[Workload, Mapping[str, Rung]]) -> list[Any]:
    from plotly import graph_objects as go

    figures = []
    for (model, context, batch), ladder in sorted(best.items()):
        if len(ladder) == 1:
            continue  # one rung is no ladder; the table has it
        ranked = sorted(ladder.items(), key=lambda item: item[1].dollars)
        figure = go.Figure(
            go.Bar(
                x=[rung.dollars for _, rung in ranked],
                y=[f"{gpu}: {lever(rung.cell)}" for gpu, rung in ranked],
                orientation="h",
                hovertext=[rung.cell.traces for _, rung in ranked],
                marker={"color": "#3465a4"},
                texttemplate="%{x:.2f}",
            )
        )
        figure.update_layout(
            title=f"{model}, ctx {context}, batch {batch}",
            xaxis_title="$ a million tokens",
            height=170 + 34 * len(ranked),
        )
        figure.update_yaxes(autorange="reversed", automargin=True)
        figures.append(figure)
    return figures

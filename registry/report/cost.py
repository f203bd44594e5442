"""What a million tokens cost on each GPU with its best lever: the study's inverted ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry import floor
from registry.report.document import Row, Section, Table
from registry.report.labels import label, number, varying
from registry.report.observation import TPOT, cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.report.observation import Measured, Observation


def cost(observations: Sequence[Observation], prices: Mapping[str, float]) -> list[Section]:
    """For each model, context and batch the cheapest cell of each GPU, the cheapest GPU first.

    Args:
        observations: Any runs; only steps that were measured on a GPU with a price count.
        prices: Dollars an hour by GPU profile, over those of the records.
    """
    priced = [
        (one, price)
        for one in cells([one for one in observations if one.record.kind == "step"])
        if one.ok and (price := prices.get(one.config["gpu"]["name"], one.config["gpu"]["price_usd_per_hour"]))
    ]
    best: dict[tuple[str, int, int], dict[str, tuple[float, float, Measured]]] = {}
    for one, price in priced:
        dollars = _dollars(one, price)
        ladder = best.setdefault(_workload(one), {})
        gpu = one.config["gpu"]["name"]
        if gpu not in ladder or dollars < ladder[gpu][0]:
            ladder[gpu] = dollars, price, one
    axes = [
        axis for axis in varying([one.config for one, _ in priced]) if axis not in ("model", "context", "batch_size")
    ]
    axes = [axis for axis in axes if axis not in ("gpu", "cache", "seed")]
    headings = ["model", "context", "batch", "GPU", *axes, "$/h", "TPOT ms", "$/Mtok", "times the cheapest"]
    rows = [row for workload, ladder in sorted(best.items()) for row in _rows(workload, ladder, axes)]
    unpriced = sorted(
        {one.record.config["gpu"]["name"] for one in observations} - {one.config["gpu"]["name"] for one, _ in priced}
    )
    text = [
        "Price an hour x median step time / batch, over the cells on record; idle time, network and storage are left "
        "out. The prices are those of the records' GPU profiles, with their sources there, or as given.",
    ]
    if unpriced:
        text.append(
            f"Without a measured step and a price: {', '.join(unpriced)}; price.GPU=DOLLARS_AN_HOUR gives one."
        )
    table = Table(headings, rows, text_columns=4 + len(axes))
    return [Section("$/Mtok with the best lever of each GPU", text, [table], lambda: _ladder(best))]


def _dollars(one: Measured, price: float) -> float:
    return floor.usd_per_mtok(one.median(TPOT) or 0.0, price, one.config["protocol"]["batch_size"])


def _workload(one: Measured) -> tuple[str, int, int]:
    protocol = one.config["protocol"]
    return one.config["model"]["name"], protocol["context"], protocol["batch_size"]


def _rows(
    workload: tuple[str, int, int], ladder: Mapping[str, tuple[float, float, Measured]], axes: Sequence[str]
) -> list[Row]:
    ranked = sorted(ladder.items(), key=lambda item: item[1][0])
    least = ranked[0][1][0]
    model, context, batch = workload
    return [
        Row(
            [
                *(model, str(context), str(batch), gpu, *label(one.config, axes)),
                *(number(price, 2), number(one.median(TPOT), 2), number(dollars, 2), f"{dollars / least:.2f}"),
            ],
            one.ok,
        )
        for gpu, (dollars, price, one) in ranked
    ]


def _ladder(best: Mapping[tuple[str, int, int], Mapping[str, tuple[float, float, Measured]]]) -> list[Any]:
    from plotly import graph_objects as go

    figures = []
    for (model, context, batch), ladder in sorted(best.items()):
        ranked = sorted(ladder.items(), key=lambda item: item[1][0])
        levers = [
            " ".join(one.config[axis]["name"] for axis in ("backend", "quant", "execution"))
            for _, (_, _, one) in ranked
        ]
        figure = go.Figure(
            go.Bar(
                x=[dollars for _, (dollars, _, _) in ranked],
                y=[f"{gpu}: {lever}" for (gpu, _), lever in zip(ranked, levers, strict=True)],
                orientation="h",
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

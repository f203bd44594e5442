"""What a larger batch costs in latency and brings in throughput: the study's section 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, percent, varying
from registry.report.observation import TPOT, apart_from, cells, only, same_software

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

BATCH = "protocol.batch_size"
SHOWN = ("gpu", "model", "execution", "context", "batch_size")
"""Axes that have a column of their own, whether they vary or not."""


def batches(observations: Sequence[Observation]) -> list[Section]:
    """Step time and tokens a second by batch size, each against batch 1 of the same cell."""
    found = sorted((one for one in cells(observations) if one.ok), key=_place)
    axes = [axis for axis in varying(found) if axis not in SHOWN] if found else []
    rows = [_row(one, first, axes) for one in found if (first := alone(one, found))]
    headings = ["GPU", "model", "execution", *axes, "context", "batch", "TPOT ms", "within", "across"]
    headings += ["latency", "tok/s", "throughput"]
    text = [
        "latency and throughput are ratios to the one cell of batch 1 with the same configuration otherwise, device "
        "and software; tokens a second are batch / median step time. within and across are coefficients of "
        "variation of the steps in a session and of the sessions' medians.",
    ]
    if left := [one for one in found if not alone(one, found)]:
        text.append(f"Without one cell of batch 1 to be set against: {len(left)} cells.")
    table = Table([*headings, "decode peak GB"], rows, 5 + len(axes), ("decode peak GB", "within", "across"))
    return [Section("Batch size", text, [table], lambda: _curves(found, axes), True)]


def _batch(one: Measured) -> int:
    return int(one.config["protocol"]["batch_size"])


def alone(one: Measured, found: Sequence[Measured]) -> Measured | None:
    """The cell of batch 1 that differs in nothing else."""
    own = apart_from(one, BATCH)
    return only(
        other
        for other in found
        if _batch(other) == 1
        and other.copy == one.copy
        and apart_from(other, BATCH) == own
        and same_software(other, one)
    )


def latency(one: Measured, first: Measured) -> float | None:
    """By what a step takes longer than that of batch 1."""
    mine, theirs = one.median(TPOT), first.median(TPOT)
    return mine / theirs if mine and theirs else None


def throughput(one: Measured, first: Measured) -> float | None:
    """By what there are more tokens a second than at batch 1."""
    longer = latency(one, first)
    return _batch(one) / longer if longer else None


def _place(one: Measured) -> tuple[str, str, str, int, str, int]:
    c = one.config
    names = c["gpu"]["name"], c["model"]["name"], c["execution"]["name"], c["protocol"]["context"]
    return *names, apart_from(one, BATCH), _batch(one)


def _row(one: Measured, first: Measured, axes: Sequence[str]) -> Row:
    c, batch = one.config, _batch(one)
    step = one.median(TPOT)
    figures = [
        number(step, 2),
        percent(one.spread.within),
        percent(one.spread.across),
        f"x{number(latency(one, first), 2)}",
        number(batch / step * 1e3 if step else None, 1),
        f"x{number(throughput(one, first), 2)}",
    ]
    names = [c["gpu"]["name"], c["model"]["name"], c["execution"]["name"], *label(one, axes)]
    names += [str(c["protocol"]["context"]), str(batch)]
    return Row([*names, *figures, number(one.median("decode_peak_memory_gb"), 2)], [*one.ok, *first.ok])


def _curves(found: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    figure = go.Figure()
    groups: dict[str, list[Measured]] = {}
    for one in found:
        names = ["execution", *axes, "context"]
        groups.setdefault(named(one, names), []).append(one)
    for name, members in groups.items():
        if len(members) > 1:
            sizes, times = [_batch(one) for one in members], [one.median(TPOT) for one in members]
            traces = [one.traces for one in members]
            figure.add_trace(go.Scatter(x=sizes, y=times, name=name, mode="lines+markers", hovertext=traces))
    figure.update_layout(
        xaxis={"title": "batch", "dtick": 1}, yaxis={"title": "step time, ms", "rangemode": "tozero"}
    )
    return [figure] if figure.data else []

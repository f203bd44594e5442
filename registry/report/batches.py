"""What a larger batch costs in latency and brings in throughput: the study's section 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.report.document import Row, Section, Table
from registry.report.labels import number
from registry.report.observation import TPOT, cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation


def batches(observations: Sequence[Observation]) -> list[Section]:
    """Step time and tokens a second by batch size, each against batch 1 of the same cell."""
    found = sorted((one for one in cells(observations) if one.ok), key=_place)
    alone = {_apart_from_batch(one): one for one in found if _batch(one) == 1}
    rows = [_row(one, alone[key]) for one in found if (key := _apart_from_batch(one)) in alone]
    headings = ["GPU", "execution", "context", "batch", "TPOT ms", "latency", "tok/s", "throughput", "decode peak GB"]
    text = (
        "latency and throughput are ratios to batch 1 of the same execution and context; tokens a second are batch / "
        "median step time.",
    )
    return [Section("Batch size", text, [Table(headings, rows, text_columns=2)], lambda: _curves(found))]


def _batch(one: Measured) -> int:
    return int(one.config["protocol"]["batch_size"])


def _apart_from_batch(one: Measured) -> tuple[str, str, str, int]:
    c = one.config
    return one.device, c["model"]["name"], c["execution"]["name"], c["protocol"]["context"]


def _place(one: Measured) -> tuple[tuple[str, str, str, int], int]:
    return _apart_from_batch(one), _batch(one)


def _row(one: Measured, alone: Measured) -> Row:
    c, batch = one.config, _batch(one)
    step, first = one.median(TPOT) or 0.0, alone.median(TPOT) or 0.0
    figures = [number(step, 2), f"x{step / first:.2f}", number(batch / step * 1e3, 1), f"x{batch * first / step:.2f}"]
    names = [c["gpu"]["name"], c["execution"]["name"], str(c["protocol"]["context"]), str(batch)]
    return Row([*names, *figures, number(one.median("decode_peak_memory_gb"), 2)], one.ok)


def _curves(found: Sequence[Measured]) -> list[Any]:
    from plotly import graph_objects as go

    figure = go.Figure()
    groups: dict[tuple[str, str, str, int], list[Measured]] = {}
    for one in found:
        groups.setdefault(_apart_from_batch(one), []).append(one)
    for (_, _, execution, context), members in groups.items():
        if len(members) > 1:
            sizes, times = [_batch(one) for one in members], [one.median(TPOT) for one in members]
            figure.add_trace(go.Scatter(x=sizes, y=times, name=f"{execution}, ctx {context}", mode="lines+markers"))
    figure.update_layout(
        xaxis={"title": "batch", "dtick": 1}, yaxis={"title": "step time, ms", "rangemode": "tozero"}
    )
    return [figure] if figure.data else []

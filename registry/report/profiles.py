"""Where a step's time goes: kernels, gaps and host beside the step that nobody profiled: the study's section 8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from registry import profile
from registry.kernels import apart
from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, percent, varying
from registry.report.observation import TPOT, cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

COPIES = "memcpy_ms"
FIGURES = (
    ("busy ms", "gpu_busy_ms", 3),
    ("memcpy ms", COPIES, 3),
    ("launch gap ms", "launch_gap_ms", 3),
    ("host ms", "host_ms", 3),
    ("kernels", "kernels_per_step", 0),
    ("a block", "kernels_per_block", 0),
    ("inflation", "profiler_inflation", 2),
    ("cpu/cuda", "cpu_cuda_ratio", 2),
    ("bw_util", "bw_util", 3),
    ("profiled", "bw_util_profiled", 3),
)
TOLD = 24
"""Kernels of a cell that are named."""

TRACED = "Its trace is kept, beside its record or among its run's artifacts as trace.json.gz."
NOT_TRACED = "Its trace was not kept with these records."


def profiles(observations: Sequence[Observation]) -> list[Section]:
    """Each profiled cell's parts, the doubts about them, and its kernels by time."""
    found = cells([one for one in observations if "profile" in one.record.measured])
    if not found:
        return []
    axes = varying(found)
    text = [
        "TPOT is the unprofiled median, within and across the coefficients of variation of the unprofiled steps "
        "in a session and of the sessions' medians. busy is the time in which the device ran something, memcpy that "
        "of its copies, launch gap what of the unprofiled step it did not; host is from a profiled step's start to "
        "the return of its last launch. bw_util is the study's: W + K over the spec sheet's bandwidth and the "
        "unprofiled step, and over the profiled one.",
        *(f"{named(one, axes)}: {doubt}" for one in found for doubt in _doubts(one)),
    ]
    headings = [*axes, "TPOT ms", "within", "across", *(heading for heading, *_ in FIGURES)]
    table = Table(headings, [_row(one, axes) for one in found], text_columns=len(axes))
    sections = [Section("Where a step's time goes", text, [table], lambda: _parts(found, axes), True)]
    return sections + [Section(f"Kernels of {named(one, axes)}", _whole(one), [_kernels(one)]) for one in found]


def _row(one: Measured, axes: Sequence[str]) -> Row:
    step = [number(one.median(TPOT), 3), percent(one.spread.within), percent(one.spread.across)]
    figures = [
        number(_copies(one) if metric == COPIES else one.median(metric), digits) for _, metric, digits in FIGURES
    ]
    return Row([*label(one, axes), *step, *figures], one.observations)


def _copies(one: Measured) -> float | None:
    """Out of the profiles themselves: the metrics of older records lack it."""
    told = [profile.figures(run.record.measured["profile"], run.record.metrics[TPOT]) for run in one.ok]
    found = [figures[COPIES] for figures in told if COPIES in figures]
    return float(np.median(found)) if found else None


def _doubts(one: Measured) -> list[str]:
    """Of each session's profile, each sentence once; none means that the parts make the unprofiled step."""
    told = [
        doubt for run in one.ok for doubt in profile.doubts(run.record.measured["profile"], run.record.metrics[TPOT])
    ]
    return list(dict.fromkeys(told)) or ["the profile's parts make the unprofiled step within 5 %"]


def _kernels(one: Measured) -> Table:
    last, layers = one.ok[-1], one.config["model"].get("layers")
    rows = profile.rows(last.record.measured["profile"])
    names = apart(row.name for row in rows)

    def told(name: str, some: Sequence[profile.Row]) -> Row:
        blocks = (
            [profile.a_block(row.count, layers) for row in some] if isinstance(layers, int) and layers > 1 else []
        )
        count, us, share = (sum(getattr(row, part) for row in some) for part in ("count", "us", "share"))
        figures = [f"{count:g}", f"{sum(blocks)}" if blocks else "", number(us, 1), f"{share:.1%}"]
        return Row([name, *figures], [last])

    lines = [told(names[row.name], [row]) for row in rows[:TOLD]]
    if rest := rows[TOLD:]:
        lines.append(told(f"{len(rest)} others", rest))
    return Table(["kernel", "a step", "a block", "us a step", "of the busy time"], lines)


def _whole(one: Measured) -> list[str]:
    """The last session's profile in words."""
    last = one.ok[-1]
    found = last.record.measured["profile"]
    parts = [
        f"{name.removesuffix('_us').replace('_', ' ')} {found[name]:.1f} us"
        for name in ("wall_us", "head_us", "busy_us", "gap_us", "tail_us", "launch_us", "sync_us", "memcpy_us")
        if name in found
    ]
    return [
        f"Of a profiled step: {', '.join(parts)}. {TRACED if last.traced else NOT_TRACED}",
        "a block is how often each decoder block launches a kernel anew: its launches a step over the number of "
        "blocks, rounded.",
    ]


def _parts(found: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    names = [named(one, axes) for one in found]
    figure = go.Figure()
    for name, metric, color in (("busy", "gpu_busy_ms", "#3465a4"), ("launch gap", "launch_gap_ms", "#e0a8a8")):
        times = [one.median(metric) for one in found]
        if any(time is not None for time in times):
            look = {"orientation": "h", "marker": {"color": color}, "hovertext": [one.traces for one in found]}
            figure.add_trace(go.Bar(y=names, x=times, name=name, **look))
    figure.update_layout(
        title="the unprofiled step, ms", xaxis_title="ms", barmode="stack", height=170 + 44 * len(found)
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return [figure] if figure.data else []

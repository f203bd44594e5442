"""Attention kernels alone, eagerly and in a graph, which tells dispatch and kernel apart: the study's section 6."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.report.document import Row, Section, Table
from registry.report.labels import label, named, number, percent, varying
from registry.report.observation import AGAIN, PLAIN, cells, only, same_software
from registry.report.pieces import log_axis, points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Observation

KIND = "attention"
SPARE = ("MB/call", "cosine", "events us/call", "across", "within", "n")
CALL = "median_call_us"
TOTAL = "layers_total_ms"


def attention(observations: Sequence[Observation]) -> list[Section]:
    """One row a kernel, shape and launch, and its share of a plain step of the same model and launch.

    A step that walks its positions for the first time plans and compiles, which no call here does: the share is of a
    second visit.
    """
    kernels = cells([one for one in observations if one.record.kind == KIND])
    steps = [one for one in cells([one for one in observations if one.record.kind != KIND]) if one.ok]
    if not kernels:
        return []
    axes = varying(kernels)
    headings = [
        *axes,
        "outcome",
        "n",
        "us/call",
        "events us/call",
        "within",
        "across",
        "all layers ms",
        "share of step",
    ]
    headings += ["MB/call", "GB/s", "cosine"]
    rows = [_row(one, axes, steps) for one in kernels]
    text = [
        "A call attends with one token to the context and itself; the calls rotate over 32 caches. us/call is the "
        "median over the sessions of each one's median: eagerly wall clock with a synchronise around each call, "
        "so dispatch and kernel; in a graph a replay of 32 calls, divided by them, so the kernel. events lets the "
        "host run ahead. within and across are coefficients of variation of the calls of a session and of the "
        "sessions' medians; single calls in a graph vary more than the means that its replays give. GB/s are the "
        "bytes of keys, values, query and output over us/call.",
        "The share is that of all layers' calls in the second visit's median step, revisit_median_tpot_ms, of the "
        "one cell with the same model and launch, attention=sdpa, quant=none and backend=hf, whichever its cache: "
        "the calls' is always dynamic, and the cache of a step in a graph is static. Where there is no such cell, or "
        "are several, there is no share.",
        _enabled(kernels),
    ]
    return [
        Section("Kernels", text, [Table(headings, rows, len(axes) + 1, SPARE)], lambda: _calls(kernels, axes), True)
    ]


def _row(one: Measured, axes: Sequence[str], steps: Sequence[Measured]) -> Row:
    runs = f"{len(one.ok)}/{len(one.observations)}"
    if not one.ok:
        return Row([*label(one, axes), one.outcome, runs, *[""] * 9], one.observations)
    step = only(step for step in steps if _same_step(step, one))
    total, whole = one.median(TOTAL), step.median(AGAIN) if step else None
    size = one.median("call_bytes")
    figures = [number(one.median(CALL), 2), number(one.median("event_median_call_us"), 2)]
    figures += [_within(one), percent(one.spread_of(CALL)), number(total, 3)]
    figures += [f"{total / whole:.1%}" if total and whole else "", number(size / 1e6 if size else None, 2)]
    figures += [number(one.median("call_gbs"), 0), number(one.median("output_cosine"), 5)]
    return Row([*label(one, axes), one.outcome, runs, *figures], [*one.observations, *(step.ok if step else ())])


def _within(one: Measured) -> str:
    """Spread of what was timed in a session: calls, or in a graph means of the calls that one replay makes."""
    calls = one.ok[0].record.measured.get("calls_a_launch", 1)
    return percent(one.spread.within) + (f" of {calls}-call means" if calls > 1 else "")


def _same_step(step: Measured, kernel: Measured) -> bool:
    """Whether a step is the plain one of a kernel's model and launch; the cache is each kind's own."""
    mine, theirs = kernel.config, step.config
    return (
        same_software(step, kernel)
        and theirs["model"] == mine["model"]
        and all(theirs["execution"].get(key) == mine["execution"].get(key) for key in ("name", "launch", "mode"))
        and all(theirs["protocol"][key] == mine["protocol"][key] for key in ("context", "batch_size"))
        and all(theirs[axis]["name"] == name for axis, name in PLAIN.items())
    )


def _enabled(kernels: Sequence[Measured]) -> str:
    """Which kernels PyTorch's attention could choose from inside the calls of each kernel."""
    found: dict[str, set[str]] = {}
    for kernel in kernels:
        for one in kernel.ok:
            flags = one.record.measured["sdp_enabled"]
            on = ", ".join(name for name, enabled in flags.items() if enabled)
            told = (on or "none") if flags else "it is not called"
            found.setdefault(kernel.config["attention"]["name"], set()).add(told)
    each = "; ".join(f"{name}: {' or '.join(sorted(told))}" for name, told in sorted(found.items()))
    return f"What scaled_dot_product_attention may choose from in a call. {each}." if each else ""


def _calls(kernels: Sequence[Measured], axes: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    figures = []
    told = ["attention", *(axis for axis in axes if axis not in ("attention", "model", "execution"))]
    for model in dict.fromkeys(one.config["model"]["name"] for one in kernels):
        figure = go.Figure()
        own = [one for one in kernels if one.config["model"]["name"] == model and one.ok]
        for launch, color in (("eager", "#a8c0e0"), ("cuda_graph", "#3465a4")):
            shown = [one for one in own if one.config["execution"]["name"] == launch]
            names = [named(one, told) for one in shown]
            figure.add_trace(points(shown, names, CALL, launch, color))
        kinds = {named(one, told) for one in own}
        figure.update_layout(
            title=f"one call at the shape of {model}: median, least and greatest session",
            xaxis=log_axis("us, logarithmic", figure),
            height=180 + 34 * len(kinds),
        )
        figure.update_yaxes(autorange="reversed", automargin=True)
        figures.append(figure)
    return figures

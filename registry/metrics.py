"""From what a worker measured to the figures that a run logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry import floor, profile, stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from registry.plan import Cell

SOURCE = "rfloor"
ONCE_A_LENGTH = 1.15
"""A run whose fastest first visit takes this much longer than a second one paid for lengths, not for steps."""
ROTATED_L2 = 2
"""L2 caches that rotated caches have to fill before a call finds nothing of the last round in one."""
CLOCK_SLACK = 0.02
"""A cap that leaves the clocks within this fraction of their maximum slowed nothing that could be seen."""
IDLE_BYTES = 1_000_000_000
IDLE_PERCENT = 5
"""What a device that nobody uses may have in use, and how busy it may be."""
CONTEXT_BYTES = 1_000_000_000
"""What a worker may have of the device beside what PyTorch's allocator holds: its context, and its kernels' code."""


def metrics(cell: Cell, measured: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of a measured cell, by the name under which MLflow shows it.

    Args:
        cell: The cell.
        measured: The worker's answer.

    Returns:
        Milliseconds, bytes, decimal gigabytes, ratios; the README defines each. What
        does not exist (device events on the CPU, a price without one, a compilation in eager) is left out.
    """
    gpu, batch = cell.config.gpu, cell.config.protocol.batch_size
    summary = stats.summary(measured["step_times_ms"])
    step_ms = summary["median_tpot_ms"]
    attainable = measured["read_bandwidth_gbs"]
    peak = gpu.peak_bandwidth_gbs or attainable
    streamed = measured["streamed_weight_bytes"] + measured["streamed_kv_bytes"]
    study = study_keys(cell, peak, step_ms)
    figures = summary | {
        "revisit_median_tpot_ms": stats.summary(measured["revisit_times_ms"])["median_tpot_ms"],
        "ttft_ms": measured["ttft_ms"],
        "tokens_per_s": batch / step_ms * 1e3,
        "r_floor": study["R_floor"],
        "floor_ms": study["t_floor_ms"],
        "mbu": floor.utilisation(streamed, peak, step_ms),
        "mbu_attainable": floor.utilisation(streamed, attainable, step_ms),
        "weight_bytes": study["weight_bytes"],
        "kv_bytes": study["kv_bytes_avg"],
        "streamed_bytes": streamed,
        "peak_memory_gb": measured["peak_memory_bytes"] / floor.GB,
        "decode_peak_memory_gb": measured["decode_peak_memory_bytes"] / floor.GB,
        "read_bandwidth_gbs": attainable,
        "logit_cosine": measured["fidelity"]["logit_cosine"],
        "top1_agreement": measured["fidelity"]["top1_agreement"],
    }
    if measured["event_times_ms"]:
        figures["event_median_tpot_ms"] = stats.summary(measured["event_times_ms"])["median_tpot_ms"]
    if "profile" in measured:
        figures |= profile_figures(measured["profile"], cell.study_bytes, peak, step_ms)
    if "compile_s" in measured["execution"]:
        figures["compile_s"] = measured["execution"]["compile_s"]
    if gpu.price_usd_per_hour:
        figures["usd_per_mtok"] = floor.usd_per_mtok(step_ms, gpu.price_usd_per_hour, batch)
    return figures


def kernel_metrics(cell: Cell, measured: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of an attention kernel alone.

    Returns:
        Microseconds a call, milliseconds over the model's layers, bytes, GB/s (decimal), ratios.
    """
    times, events = measured["call_times_us"], measured["event_call_times_us"]
    summary = stats.summary(times)
    call_us = summary["median_tpot_ms"]
    figures = {
        "median_call_us": call_us,
        "p90_call_us": summary["p90_tpot_ms"],
        "std_call_us": summary["std_tpot_ms"],
        "layers_total_ms": call_us * cell.architecture.layers / 1e3,
        "call_bytes": float(measured["call_bytes"]),
        "call_gbs": measured["call_bytes"] / call_us / 1e3,
        "read_bandwidth_gbs": measured["read_bandwidth_gbs"],
        **measured["fidelity"],
    }
    if events:
        figures["event_median_call_us"] = stats.summary(events)["median_tpot_ms"]
    return figures


def kernel_warnings(measured: Mapping[str, Any], l2_bytes: int | None) -> list[str]:
    """What a reader has to know before believing a kernel's figures."""
    found = [*stats.unsteady(measured["call_times_us"]), *sharing(measured)]
    if l2_bytes and measured["rotated_bytes"] < ROTATED_L2 * l2_bytes:
        found.append(
            f"the caches that the calls rotate over have {measured['rotated_bytes'] / 1e6:.0f} MB, the L2 cache has "
            f"{l2_bytes / 1e6:.0f}: part of them comes from there"
        )
    return found


def profile_figures(
    profiled: Mapping[str, Any], study_bytes: float, peak_gbs: float, step_ms: float
) -> dict[str, float]:
    """What a profile adds to the figures.

    `bw_util` is Table 8's of the study: "analytic streamed bytes per step (weights + active KV slab) divided by
    spec-sheet B_peak time", over the unprofiled median. Its 79.4 % on the L4 is 15.35 GB at 300 GB/s over its
    64.48 ms: every parameter is counted, as in its W + K. So it is `r_floor` under another name, and not `mbu`, which
    leaves an unread embedding out. `bw_util_profiled` is the same over the profiled step's time.

    Args:
        profiled: A `registry.profile.summary`.
        study_bytes: W + K.
        peak_gbs: Bandwidth that the floor is set against, GB/s.
        step_ms: Median step time, unprofiled.
    """
    figures = profile.figures(profiled, step_ms) | {"bw_util": floor.utilisation(study_bytes, peak_gbs, step_ms)}
    if "wall_us" in profiled:
        figures["bw_util_profiled"] = floor.utilisation(study_bytes, peak_gbs, profiled["wall_us"] / 1e3)
    return figures


def study_keys(cell: Cell, peak_gbs: float, step_ms: float) -> dict[str, Any]:
    """The keys of the study's own cell files (arXiv 2605.30571, section 3.2), in its conventions.

    Args:
        cell: The cell.
        peak_gbs: Bandwidth that the floor is set against, GB/s.
        step_ms: Median step time.
    """
    c, a = cell.config, cell.architecture
    batch = c.protocol.batch_size
    t_floor_ms = floor.floor_ms(cell.study_bytes, peak_gbs)
    return {
        "arch": c.model.name,
        "gpu": c.gpu.name,
        "ctx": c.protocol.context,
        "p50_ms": step_ms,
        "weight_bytes": floor.study_weight_bytes(a, c.quant.study_bits),
        "bytes_per_token_kv": a.kv_bytes_per_token(),
        "avg_ctx_during_measure": cell.mean_context,
        "kv_bytes_avg": floor.kv_bytes(a, cell.mean_context, batch),
        "bw_peak_gbs": peak_gbs,
        "t_floor_ms": t_floor_ms,
        "R_floor": t_floor_ms / step_ms,
        "n_layers": a.layers,
        "source": SOURCE,
    }


def warnings(cell: Cell, measured: Mapping[str, Any], figures: Mapping[str, float]) -> list[str]:
    """What a reader has to know before believing the figures; each a sentence, most often none."""
    found = stats.unsteady(measured["step_times_ms"])
    for moment in ("before", "after"):
        found += throttling(measured[f"device_{moment}"], moment)
    found += sharing(measured)
    found += [
        f"{name} is {figures[name]:.3f}: above 1, so a cache held part of the bytes or the bandwidth is another's"
        for name in ("r_floor", "mbu", "mbu_attainable")
        if figures[name] > 1
    ]
    first, again = figures["median_tpot_ms"], figures["revisit_median_tpot_ms"]
    if min(measured["step_times_ms"]) > again * ONCE_A_LENGTH:  # every step paid: not a few that were disturbed
        found.append(
            f"first visit: a step took {first:.2f} ms, over the same positions again {again:.2f} ms; the "
            "difference is paid once a cache length (kernel planning or compiling), not once a step"
        )
    found += compiling(measured["execution"])
    if not measured["kernels"]:
        found.append("torch.profiler saw no kernel here: which ones ran is not known")
    if "profile" in measured:
        found += profile.doubts(measured["profile"], figures["median_tpot_ms"])
    if cell.config.gpu.measure_bandwidth and not cell.config.gpu.peak_bandwidth_gbs:
        found.append("no spec sheet: r_floor and mbu stand against the measured read bandwidth")
    return found


def compiling(execution: Mapping[str, Any]) -> list[str]:
    """What a compiled step did otherwise than its name says.

    Args:
        execution: What `registry.execution.Compiled` tells; of another execution there is nothing to say.
    """
    found = []
    if execution.get("recompilations"):
        count = execution["recompilations"]
        found.append(f"recompilations while steps were timed: {count}; those steps hold the compiler's time")
    if execution.get("rerecorded"):
        found.append("CUDA graphs were recorded while steps were timed; those steps hold the recording's time")
    if execution.get("graph_breaks"):
        count, graphs = execution["graph_breaks"], execution["compiled_graphs"]
        reasons = "; ".join(execution["graph_break_reasons"])
        found.append(f"graph breaks: {count}; Python runs between the {graphs} graphs compiled of a step ({reasons})")
    if execution.get("cudagraph_skips"):
        count, mode = execution["cudagraph_skips"], execution["mode"]
        found.append(f"CUDA graphs skipped: {count}; mode {mode} promises them, and Python launched what it skipped")
    return found


def sharing(measured: Mapping[str, Any]) -> list[str]:
    """What else used the device.

    Args:
        measured: What `registry.hardware.load` found before the worker touched the device, what
            `registry.measure.load_beside` found as the timed window began, and how many processes used it in the end,
            of which the worker is one.
    """
    before, after = measured.get("load_before", {}), measured.get("contexts_after")
    others = before.get("processes", [])
    found = []
    if others:
        gb = sum(one["memory_bytes"] or 0 for one in others) / 1e9
        found.append(f"shared: {len(others)} other processes held {gb:.1f} GB of the device before the worker came")
    elif before.get("memory_used_bytes", 0) > IDLE_BYTES:
        gb = before["memory_used_bytes"] / 1e9
        found.append(
            f"shared: {gb:.1f} GB of the device were in use before the worker came, by whom it does not tell"
        )
    if before.get("utilisation_percent", 0) > IDLE_PERCENT:
        found.append(
            f"shared: the device was busy {before['utilisation_percent']} % of the time before the worker came"
        )
    if came := _came(before, measured.get("load_window", {})):
        found.append(f"shared: {came} came to the device before the timed window")
    elif not others and after is not None and after > 1:
        found.append(f"shared: {after - 1} other processes came to the device while the worker was there")
    return found


def _came(before: Mapping[str, Any], window: Mapping[str, Any]) -> str:
    """Who came between the worker's start and the timed window; where no process is told, what they hold."""
    more = len(window.get("processes", [])) - 1 - len(before.get("processes", []))  # one is the worker
    if more > 0:
        return f"{more} other processes"
    if "memory_used_bytes" not in before or "memory_used_bytes" not in window:
        return ""
    held = window["memory_used_bytes"] - before["memory_used_bytes"] - window["own_bytes"] - CONTEXT_BYTES
    return f"others with {held / 1e9:.1f} GB or more" if held > IDLE_BYTES else ""


def throttling(state: Mapping[str, Any], moment: str) -> list[str]:
    """What lowered the clocks at one end of the timed window by more than `CLOCK_SLACK`.

    Args:
        state: A `registry.hardware.snapshot`.
        moment: `before` or `after` the window.
    """
    clock, most = state.get("sm_clock_mhz"), state.get("sm_clock_max_mhz")
    if not state.get("throttled") or (clock and most and clock >= most * (1 - CLOCK_SLACK)):
        return []
    clocks = f": SM clock {clock} of {most} MHz" if clock and most else ""
    return [f"throttled {moment} the window by {' and '.join(state['throttled'])}{clocks}"]

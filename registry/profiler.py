"""Profile steps with torch.profiler, and read its trace: the part of the profile that knows torch.

The trace that Kineto writes for chrome://tracing and Perfetto is what is read, not the profiler's Python events: it
alone tells kernels from annotations of the device, which share a device type, and how many bytes a copy moved, and
it is the same in every torch that rfloor runs with.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import profile
from registry.profile import Interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from registry.execution import Execution

LEAD, STEP = "rfloor.lead", "rfloor.step"
"""Annotations of the steps in a trace: of those that warm the profiler up, and of those that count."""
LEAD_STEPS = 2
"""Of each block; what CUPTI gets wrong at the beginning of a session (pytorch/pytorch #192021) lies in these."""
TRACED_STEPS = 3
"""Steps of the first block, whose trace is kept."""
BLOCK_STEPS = 20
"""Steps of any other block: a trace is held in memory, and an eager step has thousands of events."""
KINDS = {
    "cpu_op": profile.OPERATOR,
    "cuda_runtime": profile.CALL,
    "cuda_driver": profile.CALL,
    "kernel": profile.KERNEL,
    "gpu_memcpy": profile.MEMCPY,
    "gpu_memset": profile.MEMSET,
}
"""Kineto's categories. `gpu_user_annotation` is none of the device's work: it spans the kernels of an annotation."""
UNTOLD = ("host_name", "traceName")
"""What Kineto writes into a trace that is no part of the measurement."""


def profiled(
    execution: Execution, wait: Callable[[], None], device: str, steps: int, unprofiled_ms: float, trace: Path | None
) -> dict[str, Any]:
    """Profile steps and tell where their time went. Comes after everything that is timed.

    Every step ends with a wait for the device, as a timed one does, so that what it launched lies inside it. Each
    block begins anew after the prefill's last token.

    Args:
        execution: Prepared.
        wait: Returns once the device has done what was launched.
        device: `cpu` or `cuda`.
        steps: How many.
        unprofiled_ms: Median time of a step without a profiler.
        trace: Where the gzipped trace of the first few steps goes; nowhere if `None`.

    Returns:
        `registry.profile.summary`.
    """
    found: list[profile.Step] = []
    with tempfile.TemporaryDirectory(prefix="rfloor-", dir=trace.parent if trace else None) as folder:
        for number, count in enumerate(blocks(steps, execution.room)):
            file = Path(folder, f"{number}.json")
            _record(execution, wait, device, count, file)
            content = _read(file)
            file.unlink()
            found += profile.steps(intervals(content))
            if trace and not number:
                with gzip.open(trace, "wt", encoding="utf-8") as stream:
                    json.dump({key: value for key, value in content.items() if key not in UNTOLD}, stream)
    layers = execution.backend.setup.architecture.layers
    return profile.summary(found, layers, device, unprofiled_ms)


def blocks(steps: int, room: int) -> Iterator[int]:
    """Steps that are profiled in one go: few at first, never more than the cache has room for."""
    size = TRACED_STEPS
    while steps:
        count = min(size, steps, room)
        yield count
        steps, size = steps - count, BLOCK_STEPS


def _record(execution: Execution, wait: Callable[[], None], device: str, count: int, file: Path) -> None:
    """Write the trace of a block, after steps that the profiler alone warms up on."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for name, times in ((LEAD, min(LEAD_STEPS, execution.room)), (STEP, count)):
            execution.rewind()
            wait()
            for _ in range(times):
                with torch.profiler.record_function(name):
                    execution.step()
                    wait()
    profiler.export_chrome_trace(str(file))


def _read(file: Path) -> dict[str, Any]:
    """A trace; an empty one, and a line in the log, where it is no JSON."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        print(f"torch.profiler wrote a trace that is no JSON: {error}")
        return {"traceEvents": []}
    return content


def intervals(trace: Mapping[str, Any]) -> list[Interval]:
    """The steps of a Chrome trace, and what ran on host and device.

    Args:
        trace: Its JSON: complete events (`ph` is `X`) with `ts` and `dur` in microseconds; `correlation` and `bytes`
            stand among an event's `args`.
    """
    found = []
    for event in trace["traceEvents"]:
        category, name = event.get("cat"), str(event.get("name"))
        kind = profile.STEP if (category, name) == ("user_annotation", STEP) else KINDS.get(category)
        if event["ph"] == "X" and kind:
            told = event.get("args", {})
            found.append(
                Interval(
                    name,
                    start_us=float(event["ts"]),
                    end_us=float(event["ts"]) + float(event["dur"]),
                    kind=kind,
                    correlation=int(told.get("correlation", 0)),
                    nbytes=int(told.get("bytes", 0)),
                    thread=event["tid"] if kind == profile.OPERATOR else 0,
                )
            )
    return found

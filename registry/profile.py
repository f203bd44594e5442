"""Where the time of profiled steps went: arithmetic on intervals, no torch.

`registry.profiler` reads the intervals off torch's profiler; all that is made of them is made here. Times are
microseconds on one clock, the host's; CUPTI has brought the device's onto it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from statistics import median, median_low
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

STEP, OPERATOR, CALL = "step", "operator", "call"
KERNEL, MEMCPY, MEMSET = "kernel", "memcpy", "memset"
HOST = (OPERATOR, CALL)
DEVICE = (KERNEL, MEMCPY, MEMSET)
SYNCHRONISES = re.compile("Synchronize")
"""Calls with which the host waits: cudaDeviceSynchronize, cudaStreamSynchronize, cudaEventSynchronize."""

TOLERANCE = 0.05
"""By how much of the unprofiled step a profiled one may differ and still stand for it."""
NS = 3  # decimals of a microsecond that the profiler tells


@dataclass(frozen=True)
class Interval:
    """Something that began and ended.

    Attributes:
        name: As the profiler has it.
        start_us: When it began.
        end_us: When it ended.
        kind: On the host `step` (a whole one, the wait for the device included), `operator` (of PyTorch), `call` (of
            the CUDA runtime or driver); on the device `kernel`, `memcpy`, `memset`.
        correlation: What a call shares with the device's work that it launched: one kernel, or all of a graph; 0 is
            nothing.
        nbytes: Bytes that a memcpy or a memset moved.
        thread: Of the host, for an operator.
    """

    name: str
    start_us: float
    end_us: float
    kind: str
    correlation: int = 0
    nbytes: int = 0
    thread: int = 0

    @property
    def us(self) -> float:
        """How long it took."""
        return self.end_us - self.start_us


@dataclass(frozen=True)
class Step:
    """One profiled step, and what ran for it.

    Attributes:
        whole: From its start on the host until the host has waited for the device.
        host: Operators and calls that began inside it.
        device: What they launched.
    """

    whole: Interval
    host: tuple[Interval, ...]
    device: tuple[Interval, ...]

    @property
    def timed(self) -> bool:
        """Whether something ran on the device, and all of it while the step did.

        CUPTI gives the first records of a session another clock at times, hours away (pytorch/pytorch #192021).
        """
        begin, end = self.whole.start_us, self.whole.end_us
        return bool(self.device) and all(i.start_us <= end and begin <= i.end_us for i in self.device)


@dataclass(frozen=True)
class Row:
    """A line of a profile's table.

    Attributes:
        name: A kernel, an operator, or all copies together.
        count: How often a step ran it.
        us: Microseconds a step.
        share: Of the time in which the device was busy; for operators, of the time in which any ran. Where work
            overlaps, the shares add up to more than 1.
    """

    name: str
    count: int
    us: float
    share: float


def steps(intervals: Iterable[Interval]) -> list[Step]:
    """Give each interval to the step that it belongs to; what belongs to none is left out.

    On the host that is the step in which it began. On the device it is the step of the call that launched it, which
    no difference between two clocks can spoil; where the profiler saw no such call, the step in which it began.
    """
    every = list(intervals)
    marks = sorted((i for i in every if i.kind == STEP), key=lambda mark: mark.start_us)
    starts = [mark.start_us for mark in marks]
    host: list[list[Interval]] = [[] for _ in marks]
    device: list[list[Interval]] = [[] for _ in marks]
    launched_in: dict[int, int] = {}

    def place(moment: float) -> int:
        last = bisect_right(starts, moment) - 1
        return last if last >= 0 and moment <= marks[last].end_us else -1

    for interval in every:
        if interval.kind in HOST:
            found = place(interval.start_us)
            if interval.kind == CALL and interval.correlation:
                launched_in[interval.correlation] = found
            if found >= 0:
                host[found].append(interval)
    for interval in every:
        if interval.kind in DEVICE:
            found = launched_in.get(interval.correlation, place(interval.start_us))
            if found >= 0:
                device[found].append(interval)
    return [Step(mark, tuple(host[n]), tuple(device[n])) for n, mark in enumerate(marks)]


def union_us(intervals: Iterable[Interval]) -> float:
    """Microseconds in which at least one of the intervals was running."""
    total, until = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda i: i.start_us):
        total += max(0.0, interval.end_us - max(interval.start_us, until))
        until = max(until, interval.end_us)
    return total


def self_us(operators: Iterable[Interval]) -> list[tuple[str, float]]:
    """Each operator with the microseconds that it did not spend in operators that it called itself.

    Args:
        operators: Of a thread each nests in another or does not touch it.
    """
    found: list[tuple[str, float]] = []
    open_: list[tuple[Interval, int]] = []
    for operator in sorted(operators, key=lambda i: (i.thread, i.start_us, -i.end_us)):
        while open_ and (open_[-1][0].thread != operator.thread or open_[-1][0].end_us <= operator.start_us):
            open_.pop()
        if open_:
            name, own = found[open_[-1][1]]
            found[open_[-1][1]] = name, own - operator.us
        open_.append((operator, len(found)))
        found.append((operator.name, operator.us))
    return found


def kernels_per_block(names: Iterable[str], layers: int) -> int | None:
    """Kernels that a step launches anew for each decoder block.

    A kernel that a block launches k times is launched k x `layers` times by a step, so each full name's count is
    divided by the number of layers and rounded to the nearest whole number, a half downwards, and these are added up.
    What comes from outside of the blocks (embedding, final norm, head, argmax) has other names, or is too little to
    change the rounding: it stays exact as long as no name is launched `layers` / 2 times or more there. Rounding, and
    not cutting off, counts a kernel that one block alone goes without.

    Args:
        names: Full names, template arguments included, once a launch.
        layers: Decoder blocks.

    Returns:
        `None` for a model of one block, in which nothing repeats.
    """
    if layers < 2:
        return None
    return sum(a_block(count, layers) for count in Counter(names).values())


def a_block(count: float, layers: int) -> int:
    """How often each block runs what a step runs `count` times: rounded, a half downwards."""
    return int((2 * count + layers - 1) // (2 * layers))


def summary(found: Sequence[Step], layers: int, device: str, unprofiled_ms: float) -> dict[str, Any]:
    """What a record holds of a profile: of each quantity the median over the profiled steps.

    Args:
        found: The steps.
        layers: Decoder blocks of the model.
        device: `cpu` or `cuda`.
        unprofiled_ms: Median time of a step without a profiler.

    Returns:
        Microseconds a step, but for counts and ratios. What the profiler did not see is left out.

        * `steps` profiled, `wall_us` of one, `inflation` (`wall_us` over the unprofiled median);
        * on CUDA `kernels_per_step`, `kernels_per_block` (see that function), `kernel_us` (their times added up),
          and of copies and fills `memcpys`, `memcpy_us`, `memcpy_bytes`, `memsets`, `memset_us`, `memset_bytes`,
          which are 0 in a step that has none while another has;
        * `busy_us` (at least one of all these was running), `span_us` (from the first one's start to the last one's
          end), `gap_us` (the span without the busy time), `head_us` (from the step's start on the host to the first
          one's start), `tail_us` (from the last one's end to the step's end), which with busy and gap make the wall;
        * `host_us` (from the step's start to the return of the last call that launched something), `runtime_us` (in
          any CUDA call), `launch_us` (in those that launched something), `sync_us` (in those that wait);
        * `cpu_cuda_ratio`: the study's cpu/cuda, "the fraction of profiler wall time spent on the CPU side launching
          and synchronising kernels relative to GPU kernel time" (arXiv 2605.30571, Table 8), taken as (`launch_us` +
          `sync_us`) / `kernel_us`, the wait at the step's end included. The study's own script is not public;
        * `kernels`, by their full names, and `calls`: count and `us` each, the dearest first;
        * on the CPU, which has no kernels, `operators` with the time that is their own and none of their callees',
          and `operator_us`, in which any was running; what of the wall is left is Python.
    """
    if not found:
        return {"steps": 0}
    told: dict[str, Any] = {"steps": len(found), "wall_us": round(median(step.whole.us for step in found), NS)}
    told["inflation"] = told["wall_us"] / 1e3 / unprofiled_ms
    if device == "cpu":
        told |= _medians([{"operator_us": union_us(step.host)} for step in found if step.host])
        told["operators"] = _table([self_us(step.host) for step in found])
        return told
    seen = [step for step in found if step.timed]
    moved = [kind for kind in (MEMCPY, MEMSET) if any(_of(step.device, kind) for step in seen)]
    told |= _medians([_quantities(step, layers, moved) for step in seen])
    if seen:
        told["kernels"] = _table([[(i.name, i.us) for i in _of(step.device, KERNEL)] for step in seen])
        told["calls"] = _table([[(i.name, i.us) for i in _of(step.host, CALL)] for step in seen])
    return told


def _quantities(step: Step, layers: int, moved: Sequence[str]) -> dict[str, float]:
    """One step's quantities on CUDA, as `summary` names them; whole numbers are counts.

    A step without a copy or a fill has none of those that other steps have, which is 0 and not unknown.

    Args:
        step: The step.
        layers: Decoder blocks of the model.
        moved: Of memcpy and memset, what any of the profiled steps has.
    """
    kernels, calls = _of(step.device, KERNEL), _of(step.host, CALL)
    begin, end = min(i.start_us for i in step.device), max(i.end_us for i in step.device)
    busy = union_us(step.device)
    told: dict[str, float] = {
        "kernels_per_step": len(kernels),
        "kernel_us": sum(i.us for i in kernels),
        "busy_us": busy,
        "span_us": end - begin,
        "gap_us": end - begin - busy,
        "head_us": begin - step.whole.start_us,
        "tail_us": step.whole.end_us - end,
    }
    per_block = kernels_per_block([i.name for i in kernels], layers)
    if per_block is not None:
        told["kernels_per_block"] = per_block
    for kind in moved:
        own = _of(step.device, kind)
        told |= {
            f"{kind}s": len(own),
            f"{kind}_us": sum((i.us for i in own), 0.0),
            f"{kind}_bytes": sum(i.nbytes for i in own),
        }
    if not calls:
        return told
    launched = {i.correlation for i in step.device if i.correlation}
    launches = [i for i in calls if i.correlation in launched]
    waits = [i for i in calls if SYNCHRONISES.search(i.name)]
    told |= {"runtime_us": union_us(calls), "launch_us": union_us(launches), "sync_us": union_us(waits)}
    if launches:
        told["host_us"] = max(i.end_us for i in launches) - step.whole.start_us
        if told["kernel_us"]:
            told["cpu_cuda_ratio"] = union_us([*launches, *waits]) / told["kernel_us"]
    return told


def figures(profile: Mapping[str, Any], step_ms: float) -> dict[str, float]:
    """The profile's own metrics, by the names under which MLflow shows them.

    Args:
        profile: A `summary`.
        step_ms: Median of the unprofiled steps. `launch_gap_ms` is this less the busy time: for how long the device
            has nothing to do in a step that nobody watches. Kept where it is below 0, never clipped.
    """
    told: dict[str, float] = {}
    if "wall_us" in profile:
        told["profiled_step_ms"] = profile["wall_us"] / 1e3
    if "busy_us" in profile:
        told["gpu_busy_ms"] = profile["busy_us"] / 1e3
        told["launch_gap_ms"] = step_ms - told["gpu_busy_ms"]
        told["memcpy_ms"] = profile.get("memcpy_us", 0.0) / 1e3  # not there where no step copied anything
    if "host_us" in profile:
        told["host_ms"] = profile["host_us"] / 1e3
    named = {"profiler_inflation": "inflation"} | {
        name: name for name in ("kernels_per_step", "kernels_per_block", "cpu_cuda_ratio")
    }
    return told | {name: profile[key] for name, key in named.items() if key in profile}


def doubts(profile: Mapping[str, Any], step_ms: float) -> list[str]:
    """Why the profile's parts are not the unprofiled step's, each a sentence; none where they are.

    On CUDA the parts are head, busy, gap and tail. They have to make `step_ms` within `TOLERANCE`.

    Args:
        profile: A `summary`.
        step_ms: Median of the unprofiled steps.
    """
    if "wall_us" not in profile:
        return ["torch.profiler saw no step here: there is no profile"]
    if "operators" in profile:
        parts, held = profile["wall_us"], "the operators' times hold the profiler's own"
    elif "busy_us" not in profile:
        return ["torch.profiler saw nothing run on the device: the profile holds the profiled steps' times alone"]
    else:
        parts = sum(profile[part] for part in ("head_us", "busy_us", "gap_us", "tail_us"))
        held = "the gap between kernels is the profiler's; busy time is not"
    busy_ms, ratio = profile.get("busy_us", 0.0) / 1e3, parts / 1e3 / step_ms
    if busy_ms > step_ms * (1 + TOLERANCE):
        return [
            f"the device was busy for {busy_ms:.3f} ms of a profiled step, and an unprofiled one takes {step_ms:.3f} "
            "ms: under the profiler the kernels themselves took longer"
        ]
    if abs(ratio - 1) <= TOLERANCE:
        return []
    if ratio < 1:
        held = "what the timed steps alone waited for is in no part of the profile"
    return [f"profiled steps took {ratio:.2f} times as long as unprofiled ones: {held}"]


def rows(profile: Mapping[str, Any]) -> list[Row]:
    """A profile's table for people: kernels, copies and fills, or on the CPU operators, the dearest first."""
    whole = profile.get("operator_us" if "operators" in profile else "busy_us", 0.0)
    entries = profile.get("operators", profile.get("kernels", {}))
    told = [(name, entry["count"], entry["us"]) for name, entry in entries.items()]
    told += [
        (kind.capitalize(), profile[f"{kind}s"], profile[f"{kind}_us"])
        for kind in (MEMCPY, MEMSET)
        if profile.get(f"{kind}s")
    ]
    told.sort(key=lambda row: -row[2])
    return [Row(name, count, us, us / whole if whole else 0.0) for name, count, us in told]


def _of(intervals: Iterable[Interval], kind: str) -> list[Interval]:
    return [interval for interval in intervals if interval.kind == kind]


def _medians(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name the median over the steps that have it; of a count the lower one, which is a count too."""
    told: dict[str, float] = {}
    for name in dict.fromkeys(name for step in each for name in step):
        values = [step[name] for step in each if name in step]
        counts = all(isinstance(value, int) for value in values)
        told[name] = median_low(values) if counts else round(median(values), NS)
    return told


def _table(each: Sequence[Iterable[tuple[str, float]]]) -> dict[str, dict[str, float]]:
    """Names with the medians of their count and of their time in a step, of those that most steps have."""
    told: list[dict[str, list[float]]] = []
    for step in each:
        told.append({})
        for name, us in step:
            told[-1].setdefault(name, []).append(us)
    entries = {}
    for name in dict.fromkeys(name for step in told for name in step):
        times = [step.get(name, []) for step in told]
        entries[name] = {
            "count": median_low([len(own) for own in times]),
            "us": round(median([sum(own) for own in times]), NS),
        }
    return dict(sorted(((n, e) for n, e in entries.items() if e["count"]), key=lambda item: -item[1]["us"]))

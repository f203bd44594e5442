"""The protocol: prefill, warm-up steps, timed steps; then the device's own read bandwidth.

Passes of the same length over the same positions. The first is the study's: wall clock, a synchronise
around each step, every cache length met for the first time. The second is the same again: what it is
faster by was paid once a length and not once a step (cuDNN's attention plans a kernel for every new
length). On CUDA a third lets the host run ahead and times the steps by device events. Nothing else happens
in the timed windows: the garbage collector is frozen, no event is sent to the parent, no profiler runs.
Profilers run in passes of their own after the last timed one.
"""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.execution import EXECUTIONS
from registry.hardware import load, snapshot
from registry.kernels import seen
from registry.profiler import profiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from registry.api import Backend
    from registry.schema import ExecutionConfig, ProtocolConfig

PROBE_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}
"""Size of the buffer that the bandwidth probe reads: many times any last-level cache."""
PROBE_REPEATS = 9
KIB = 1024


def measure(
    backend: Backend,
    launched: ExecutionConfig,
    protocol: ProtocolConfig,
    mean_context: float,
    stage: Callable[[str], None],
    trace: Path | None = None,
) -> dict[str, Any]:
    """Run the protocol on a loaded backend.

    Args:
        backend: Loaded with room for the context and all steps.
        launched: How the step is launched.
        protocol: Context, steps, batch and seed.
        mean_context: Tokens that a measured step attends to on average, for the bytes it streams.
        stage: Told what begins; never called inside a timed window.
        trace: Where the trace of profiled steps goes, if there are any.

    Returns:
        The raw times and what was counted beside them, ready for JSON.
    """
    import torch

    device = backend.setup.device
    memory = Memory(device)
    generator = torch.Generator().manual_seed(protocol.seed)
    shape = (protocol.batch_size, protocol.context)
    prompt = torch.randint(backend.setup.architecture.vocab, shape, generator=generator).to(device)

    stage("prefill")
    synchronise(device)
    start = time.perf_counter_ns()
    first_token = backend.prefill(prompt).argmax(dim=-1)
    synchronise(device)
    ttft_ms = (time.perf_counter_ns() - start) / 1e6
    memory.mark()

    room = protocol.warmup_steps + protocol.measured_steps
    execution = EXECUTIONS[launched.launch](backend, first_token, protocol.context, room, launched.mode)
    stage(execution.preparing())
    prepared = execution.prepare()

    stage("measure")
    beside = load_beside(device)
    before = snapshot() if device == "cuda" else {}
    with quiet():
        step_times = wall_pass(execution.step, protocol, device)
        last = execution.token.clone()
        execution.rewind()
        revisit_times = wall_pass(execution.step, protocol, device)
        agree = bool((last == execution.token).all())
        execution.rewind()
        event_times = event_pass(execution.step, protocol) if device == "cuda" else None
    after = snapshot() if device == "cuda" else {}
    bytes_per_step = backend.bytes_per_step(mean_context)
    position, evidence, peaks = backend.position(), execution.evidence(), memory.peaks()
    stage("kernels")
    execution.rewind()
    kernels = seen(execution.step, device)
    extra = {}
    if protocol.profiled_steps:
        stage("profile")
        wait, step_ms = partial(synchronise, device), statistics.median(step_times)
        with quiet():
            extra["profile"] = profiled(execution, wait, device, protocol.profiled_steps, step_ms, trace)
    execution.close()
    return {
        "ttft_ms": ttft_ms,
        "step_times_ms": step_times,
        "revisit_times_ms": revisit_times,
        "event_times_ms": event_times,
        "passes_agree": agree,
        "execution": prepared | evidence,
        "kernels": kernels,
        "streamed_weight_bytes": bytes_per_step.weights,
        "streamed_kv_bytes": bytes_per_step.kv,
        "final_position": position,
        "load_window": beside,
        "device_before": before,
        "device_after": after,
        **peaks,
        **extra,
    }


def wall_pass(step: Callable[[], Any], protocol: ProtocolConfig, device: str) -> list[float]:
    """Milliseconds of each measured step, the host waiting for the device around each."""
    for _ in range(protocol.warmup_steps):
        step()
    times = []
    for _ in range(protocol.measured_steps):
        synchronise(device)
        start = time.perf_counter_ns()
        step()
        synchronise(device)
        times.append(time.perf_counter_ns() - start)
    return [t / 1e6 for t in times]


def event_pass(step: Callable[[], Any], protocol: ProtocolConfig) -> list[float]:
    """Milliseconds between the device events after consecutive steps, the host never waiting."""
    import torch

    for _ in range(protocol.warmup_steps):
        step()
    events = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(protocol.measured_steps + 1)
    ]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def load_beside(device: str) -> dict[str, Any]:
    """What runs on the device as the timed window begins, this process included, which has been there for minutes.

    Returns:
        `registry.hardware.load`'s without its utilisation, which is this process's own here; and `own_bytes`, which
        PyTorch's allocator holds. Empty on the CPU.
    """
    found = load() if device == "cuda" else {}
    if not found:
        return {}
    import torch

    found.pop("utilisation_percent", None)
    return found | {"own_bytes": torch.cuda.memory_reserved()}


def synchronise(device: str) -> None:
    """Wait until the device has done what was launched."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside; what lives is moved out of the collector's sight."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Memory:
    """Peak memory of the process's whole life, and of decoding alone.

    On CUDA what PyTorch's allocator handed out; on the CPU the resident set.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._life = 0

    def mark(self) -> None:
        """Decoding begins: forget the peak so far, after noting it."""
        self._life = self._read()
        if self._device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            # proc(5): writing 5 to clear_refs resets the peak resident set size.
            Path("/proc/self/clear_refs").write_text("5")

    def peaks(self) -> dict[str, int]:
        """Both peaks, in bytes."""
        decode = self._read()
        return {"peak_memory_bytes": max(self._life, decode), "decode_peak_memory_bytes": decode}

    def _read(self) -> int:
        if self._device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
        return 0


def read_bandwidth(device: str) -> float:
    """Read bandwidth of this device as this process attains it, GB/s (decimal).

    Reductions of a buffer far larger than any cache: each byte is read once and nothing is written. Of
    the reductions tried the best one counts, of its repeats the median.
    """
    import torch

    buffer = torch.ones(PROBE_BYTES[device] // 4, dtype=torch.float32, device=device)
    reductions = (buffer.sum, buffer.amax, buffer.view(torch.int32).amax)
    return max(buffer.nbytes / statistics.median(_times(reduce, device)) / 1e9 for reduce in reductions)


def _times(run: Callable[[], Any], device: str) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    times = []
    for _ in range(PROBE_REPEATS + 1):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return times[1:]

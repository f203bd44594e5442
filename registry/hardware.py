"""The device as found: what it is, what state it is in, and what runs on it. NVML and /proc, no torch."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.environments import version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of `nvmlDeviceGetCurrentClocksEventReasons` (nvml.h) that lower the clocks against the user's will."""

DEV = Path("/dev")
COUNT = """
import ctypes
count, cuda = ctypes.c_int(), ctypes.CDLL("libcuda.so.1")
print(count.value if not cuda.cuInit(0) and not cuda.cuDeviceGetCount(ctypes.byref(count)) else 0)
"""
"""Prints how many GPUs the driver has: also where there are no device files, as in WSL."""


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: `cuda` or `cpu`.
        name: As NVML or /proc/cpuinfo names it.
        memory_bytes: All of its memory.
        uuid: NVML's, empty for a CPU.
        capability: CUDA compute capability, `None` for a CPU.
        driver: NVIDIA driver version, empty for a CPU.
        unseen: Of a CPU, how a GPU is known to be here that NVML does not tell of; empty where there is none.
    """

    kind: str
    name: str
    memory_bytes: int
    uuid: str = ""
    capability: tuple[int, int] | None = None
    driver: str = ""
    unseen: str = ""


def find_device() -> Device:
    """The GPU that CUDA would call device 0, or the CPU when there is none."""
    with _nvml() as nvml:
        handle = _visible_handle(nvml) if nvml else None
        if handle is None:
            return replace(cpu_device(), unseen="" if nvml else _unseen_gpu())
        return Device(
            kind="cuda",
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=_memory_bytes(nvml, handle),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
        )


def cpu_device() -> Device:
    """The host's processor and memory."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    name = match[1] if match else platform.processor() or "CPU"
    return Device(kind="cpu", name=name, memory_bytes=_host_memory_bytes())


def snapshot() -> dict[str, Any]:
    """The visible GPU's state now: clocks (MHz), temperature (C), power (W), why its clocks are lowered.

    Returns:
        Empty where there is no GPU; a key is absent where the device does not tell it.
    """
    with _nvml() as nvml:
        handle = _visible_handle(nvml) if nvml else None
        if handle is None:
            return {}
        readings = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "throttled": lambda: throttle_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
        return _told(nvml, readings)


def load() -> dict[str, Any]:
    """What runs on the visible GPU now, asked by a process that has not used it yet.

    Returns:
        `processes`: of each its PID (of the driver's own PID namespace) and bytes; `memory_used_bytes` without what
        the driver keeps for itself; `utilisation_percent`: of the last second or less in which any kernel ran. Empty
        where there is no GPU; a key is absent where the device does not tell it.
    """
    with _nvml() as nvml:
        handle = _visible_handle(nvml) if nvml else None
        return {} if handle is None else _told(nvml, _load_readings(nvml, handle))


def contexts() -> int | None:
    """How many processes use the visible GPU; `None` where nobody tells."""
    processes = load().get("processes")
    return None if processes is None else len(processes)


def throttle_reasons(bits: int) -> list[str]:
    """The words for NVML's clock event bits, those alone that slow a run down."""
    return [reason for bit, reason in THROTTLE_REASONS.items() if bits & bit]


def physical_cores() -> int:
    """Physical cores that this process may use: hyperthreads share the bandwidth that a step wants.

    Not more than it has the time of.
    """
    allowed = os.sched_getaffinity(0)
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() for cpu in allowed}
    return max(1, min(len(siblings - {""}) or len(allowed), _quota()))


def _quota() -> int:
    """Processors whose time this process may use up: a container may see many and have few (cgroup v2's cpu.max)."""
    own = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    group, quotas = Path("/sys/fs/cgroup", own.lstrip("/")), [sys.maxsize]
    for folder in (group, *group.parents):
        limit, _, period = _read(str(folder / "cpu.max")).partition(" ")
        if limit.isdigit():
            quotas.append(math.ceil(int(limit) / int(period)))
    return min(quotas)


def collect_versions(packages: Iterable[str], environment: str = "") -> dict[str, str]:
    """Installed versions by package name, in rfloor's environment or another; what is not installed is left out."""
    found = {package: version(package, environment) for package in packages}
    return {"python": platform.python_version()} | {name: told for name, told in found.items() if told}


def collect_git() -> dict[str, str]:
    """Commit of the checkout, and whether it differs from it; empty outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def describe(device: Device) -> dict[str, Any]:
    """What a record says of its machine."""
    told = asdict(device)
    del told["unseen"]
    return {**told, "os": platform.platform(), "cpu": cpu_device().name, "cores": physical_cores()}


def _told(nvml: Any, readings: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The readings that the device gives."""
    state: dict[str, Any] = {}
    for key, read in readings.items():
        try:
            state[key] = read()
        except nvml.NVMLError:
            continue
    return state


def _load_readings(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    def processes() -> list[dict[str, Any]]:
        kinds = (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses)
        found = {one.pid: one.usedGpuMemory for kind in kinds for one in kind(handle)}
        return [{"pid": pid, "memory_bytes": size} for pid, size in found.items()]

    return {
        "processes": processes,
        "memory_used_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used),
        "utilisation_percent": lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
    }


@contextmanager
def _nvml() -> Iterator[Any]:
    """pynvml, initialised; `None` where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, or one that does not answer: each means no GPU
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _visible_handle(nvml: Any) -> Any:
    """The NVML handle of CUDA's device 0, `None` if CUDA_VISIBLE_DEVICES hides every GPU."""
    first = _first_visible()
    try:
        if first.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(first)
        if first.startswith("GPU-"):  # CUDA takes the beginning of a UUID, NVML all of it
            handles = (nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount()))
            return next((h for h in handles if _text(nvml.nvmlDeviceGetUUID(h)).startswith(first)), None)
        return nvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdecimal() else None
    except nvml.NVMLError:
        return None


def _first_visible() -> str:
    """What CUDA_VISIBLE_DEVICES calls CUDA's device 0."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def _unseen_gpu() -> str:
    """What shows that CUDA has a GPU here although NVML does not tell of it; empty if nothing does.

    A library alone is no GPU: machines without one have it too.
    """
    if not _first_visible().startswith((*"0123456789", "GPU-", "MIG-")):
        return ""
    nodes = sorted(str(node) for node in DEV.glob("nvidia[0-9]*"))
    if nodes:
        return nodes[0]
    try:  # a process of its own: CUDA is to be initialised in the workers alone
        command = [sys.executable, "-I", "-S", "-c", COUNT]  # which imports nothing out of the folder it starts in
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return "libcuda.so.1" if told.strip().isdecimal() and int(told) else ""


def _memory_bytes(nvml: Any, handle: Any) -> int:
    """A GPU's memory; the host's where the GPU has none of its own to tell of."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:
        return _host_memory_bytes()


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

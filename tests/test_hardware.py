"""The device as found, on a machine with an NVML made of Python."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from registry import hardware
from registry.hardware import Device, find_device, snapshot, throttle_reasons

UUIDS = ("GPU-aaaa0000-1111", "GPU-bbbb0000-2222")
NAMES = ("NVIDIA L4", b"NVIDIA H200")  # older bindings return bytes
FIRST = Device("cuda", "NVIDIA L4", 1 << 30, UUIDS[0], (8, 9), "570.86.15")
SECOND = Device("cuda", "NVIDIA H200", 2 << 30, UUIDS[1], (8, 9), "570.86.15")
STATE = {
    "sm_clock_mhz": 1980,
    "sm_clock_max_mhz": 2040,
    "memory_clock_mhz": 6251,
    "temperature_c": 45,
    "power_w": 71.5,
    "throttled": ["software power cap"],
}


class FakeNvml(ModuleType):
    """Two GPUs. A function whose name is in `failing` raises."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlMemory_v2 = 0x02000028  # noqa: N815

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.failing: set[str] = set()
        self.initialised = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.failing:
            return self._fail
        return super().__getattribute__(name)

    def _fail(self, *_: object, **__: object) -> None:
        raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:  # noqa: N802
        self.initialised += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= len(UUIDS):
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid != "MIG-slice-of-the-second":
            raise self.NVMLError("Not Found")
        return 1

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return NAMES[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        return UUIDS[handle].encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:  # noqa: N802
        return SimpleNamespace(total=(handle + 1) << 30, used=(5 if version is None else 3) << 20)

    def nvmlDeviceGetComputeRunningProcesses(self, _: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=11, usedGpuMemory=2 << 20), SimpleNamespace(pid=12, usedGpuMemory=None)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, _: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=11, usedGpuMemory=2 << 20)]

    def nvmlDeviceGetUtilizationRates(self, _: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=40, memory=7)

    def nvmlDeviceGetCudaComputeCapability(self, _: int) -> list[int]:  # noqa: N802
        return [8, 9]

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.86.15"

    def nvmlDeviceGetClockInfo(self, _: int, kind: int) -> int:  # noqa: N802
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 6251}[kind]

    def nvmlDeviceGetMaxClockInfo(self, _: int, kind: int) -> int:  # noqa: N802
        return {self.NVML_CLOCK_SM: 2040}[kind]

    def nvmlDeviceGetTemperature(self, *_: int) -> int:  # noqa: N802
        return 45

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:  # noqa: N802
        return 71_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: int) -> int:  # noqa: N802
        return 0x04 | 0x01


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """NVML with two GPUs, all of them visible."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.mark.parametrize(
    ("visible", "device"),
    [
        (None, FIRST),
        ("0", FIRST),
        ("1", SECOND),
        (" 1 , 0", SECOND),
        ("1,7", SECOND),
        (UUIDS[1], SECOND),
        ("GPU-bbbb", SECOND),
        (f"{UUIDS[0]},{UUIDS[1]}", FIRST),
        ("MIG-slice-of-the-second", SECOND),
        ("", None),
        ("-1", None),
        ("-1,0", None),
        ("7", None),
        ("GPU-cccc", None),
        ("MIG-gone", None),
        ("NoDevFiles", None),
        ("²", None),
    ],
)
def test_the_device_is_cuda_s_first_visible_one(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, device: Device | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device() == (device or hardware.cpu_device())
    assert bool(snapshot()) is (device is not None)
    assert nvml.initialised == 0, "NVML is left as it was found"


def no_library(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def no_driver(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    nvml.failing.add("nvmlInit")


def broken_library(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))


@pytest.mark.parametrize("without", [no_library, no_driver, broken_library])
def test_without_nvml_and_without_a_gpu_the_device_is_the_cpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without: Callable[..., None]
) -> None:
    without(monkeypatch, nvml)
    monkeypatch.setattr(hardware, "DEV", tmp_path)
    monkeypatch.setattr(hardware, "COUNT", "print(0)")
    assert find_device() == hardware.cpu_device()
    assert snapshot() == {}
    assert hardware.load() == {}
    assert hardware.contexts() is None


@pytest.mark.parametrize("without", [no_library, no_driver, broken_library])
@pytest.mark.parametrize(
    ("visible", "node", "counts", "unseen"),
    [
        (None, "nvidia0", "print(0)", "nvidia0"),
        ("1", "nvidia1", "print(0)", "nvidia1"),
        ("GPU-aaaa", "nvidia0", "print(0)", "nvidia0"),
        (None, "nvidiactl", "print(2)", "libcuda.so.1"),
        (None, "nvidiactl", "print(0)", ""),
        (None, "nvidiactl", "import no_such_library", ""),
        ("", "nvidia0", "print(1)", ""),
        ("-1", "nvidia0", "print(1)", ""),
    ],
)
def test_a_gpu_that_nvml_does_not_tell_of_is_no_cpu_alone(
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    without: Callable[..., None],
    visible: str | None,
    node: str,
    counts: str,
    unseen: str,
) -> None:
    without(monkeypatch, nvml)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / node).touch()
    monkeypatch.setattr(hardware, "DEV", tmp_path)
    monkeypatch.setattr(hardware, "COUNT", counts)
    found = find_device()
    assert found.kind == "cpu"
    assert found.unseen.rpartition("/")[2] == unseen


def test_the_count_of_gpus_is_no_number_without_libcuda() -> None:
    told = subprocess.run([sys.executable, "-c", hardware.COUNT], capture_output=True, text=True, check=False)
    assert told.stdout.strip().isdecimal() or "libcuda.so.1" in told.stderr


def test_a_gpu_that_shares_the_host_s_memory(nvml: FakeNvml) -> None:
    """NVML tells no memory of an integrated GPU."""
    nvml.failing.add("nvmlDeviceGetMemoryInfo")
    found = find_device()
    assert (found.name, found.memory_bytes) == ("NVIDIA L4", hardware.cpu_device().memory_bytes)


def test_snapshot(nvml: FakeNvml) -> None:
    assert snapshot() == STATE


@pytest.mark.parametrize(
    ("function", "keys"),
    [
        ("nvmlDeviceGetClockInfo", {"sm_clock_mhz", "memory_clock_mhz"}),
        ("nvmlDeviceGetMaxClockInfo", {"sm_clock_max_mhz"}),
        ("nvmlDeviceGetTemperature", {"temperature_c"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", {"throttled"}),
    ],
)
def test_a_snapshot_leaves_out_what_the_device_does_not_tell(nvml: FakeNvml, function: str, keys: set[str]) -> None:
    nvml.failing.add(function)
    assert snapshot() == {key: value for key, value in STATE.items() if key not in keys}


LOAD = {
    "processes": [{"pid": 11, "memory_bytes": 2 << 20}, {"pid": 12, "memory_bytes": None}],
    "memory_used_bytes": 3 << 20,
    "utilisation_percent": 40,
}


def test_what_else_runs_on_the_device(nvml: FakeNvml) -> None:
    """A process that computes and draws is one process; what the driver keeps for itself is nobody's."""
    assert hardware.load() == LOAD
    assert hardware.contexts() == 2
    assert nvml.initialised == 0


@pytest.mark.parametrize(
    ("function", "key"),
    [
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
        ("nvmlDeviceGetMemoryInfo", "memory_used_bytes"),
        ("nvmlDeviceGetUtilizationRates", "utilisation_percent"),
    ],
)
def test_a_load_leaves_out_what_the_device_does_not_tell(nvml: FakeNvml, function: str, key: str) -> None:
    nvml.failing.add(function)
    assert hardware.load() == {name: value for name, value in LOAD.items() if name != key}
    assert (hardware.contexts() is None) == (key == "processes")


def test_the_real_bindings_have_every_function_that_is_called() -> None:
    real = pytest.importorskip("pynvml")
    called = [name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in called if not hasattr(real, name)] == []


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0, []),
        (0x01, []),  # idle
        (0x02, []),  # clocks set by the user
        (0x04, ["software power cap"]),
        (0x08, ["hardware slowdown"]),
        (0x10, []),  # sync boost
        (0x20, ["software thermal slowdown"]),
        (0x40, ["hardware thermal slowdown"]),
        (0x80, ["hardware power brake"]),
        (0x100, []),  # display clocks
        (0x48, ["hardware slowdown", "hardware thermal slowdown"]),
    ],
)
def test_throttle_reasons(bits: int, reasons: list[str]) -> None:
    assert throttle_reasons(bits) == reasons


# The host


def test_the_cpu_has_a_name_and_all_of_the_memory() -> None:
    device = hardware.cpu_device()
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert device.name
    assert device.memory_bytes == pytest.approx(int(total.split()[1]) * 1024, rel=0.01)
    assert (device.kind, device.uuid, device.capability, device.driver) == ("cpu", "", None, "")


@pytest.mark.parametrize(
    ("siblings", "cores"),
    [
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, 2),
        ({0: "0-1", 1: "0-1", 2: "2-3"}, 2),
        ({0: "0", 1: "1", 2: "2"}, 3),
        ({0: "", 1: "", 2: ""}, 3),  # no topology is told: each is taken for a core
        ({3: "3,7\n"}, 1),
    ],
)
def test_physical_cores(monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings))
    told = {f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    monkeypatch.setattr(hardware, "_read", lambda path: told.get(path, ""))
    assert hardware.physical_cores() == cores


@pytest.mark.parametrize(
    ("own", "limits", "cores"),
    [
        ("/", {"": "200000 100000"}, 2),
        ("/", {"": "max 100000"}, 16),
        ("/a/b", {"/a": "150000 100000", "/a/b": "max 100000"}, 2),
        ("/a/b", {"/a": "300000 100000", "/a/b": "50000 100000"}, 1),
        ("/a", {}, 16),
    ],
)
def test_a_container_has_as_many_cores_as_it_has_time_of(
    monkeypatch: pytest.MonkeyPatch, own: str, limits: dict[str, str], cores: int
) -> None:
    told = {f"/sys/fs/cgroup{group}/cpu.max": f"{limit}\n" for group, limit in limits.items()}
    told["/proc/self/cgroup"] = f"1:name=systemd:/x\n0::{own}\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(hardware, "_read", lambda path: told.get(path, ""))
    assert hardware.physical_cores() == cores


def test_physical_cores_here() -> None:
    assert 1 <= hardware.physical_cores() <= len(os.sched_getaffinity(0))


def test_versions_of_what_is_installed() -> None:
    found = hardware.collect_versions(["pytest", "no-such-package"])
    assert found == {"python": platform.python_version(), "pytest": pytest.__version__}


def test_what_a_record_says_of_its_machine(nvml: FakeNvml) -> None:
    told = hardware.describe(find_device())
    assert told["name"] == "NVIDIA L4"
    assert told["cpu"] == hardware.cpu_device().name
    assert told["cores"] == hardware.physical_cores()


# The checkout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which rfloor seems to lie."""
    (tmp_path / "registry").mkdir()
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "registry" / "hardware.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a hook that runs the tests has them
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout_and_whether_it_is_dirty(checkout: Path) -> None:
    git(checkout, "init")
    (checkout / "file").write_text("one")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "first")
    head = git(checkout, "rev-parse", "HEAD")
    assert hardware.collect_git() == {"commit": head, "dirty": "false"}
    (checkout / "file").write_text("two")
    assert hardware.collect_git() == {"commit": head, "dirty": "true"}


def test_outside_a_checkout_there_is_no_commit(checkout: Path) -> None:
    assert hardware.collect_git() == {}


def test_a_checkout_without_a_commit_has_none(checkout: Path) -> None:
    git(checkout, "init")
    assert hardware.collect_git() == {}


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert hardware.collect_git() == {}

"""What several test files share."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

# Nothing here may wait for a network: a hub id is found in a cache or not at all.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings
from planning import H200, Plan
from sweeps import FAULTS, ROOT, Start, Sweep, database, marked

from registry.architecture import Architecture
from registry.cache import KERNELS
from registry.compose import Composer
from registry.hardware import Device
from registry.plan import Cell, Planner
from registry.plugins import Catalog
from registry.schema import GpuConfig

# The example plugin is a distribution of its own, whose tests run in its own environment.
collect_ignore_glob = ["plugin_*/*"]

settings.register_profile("rfloor", deadline=None)
settings.load_profile("rfloor")


@pytest.fixture(scope="session")
def composer() -> Composer:
    """Composes cells from conf/ and the installed plugins."""
    return Composer(Catalog())


@pytest.fixture(scope="session")
def architecture(composer: Composer) -> Architecture:
    """The tiny model of conf/model."""
    return Architecture.of(composer.cell(["model=tiny"]).model)


@pytest.fixture(scope="session")
def profiles(composer: Composer) -> dict[str, GpuConfig]:
    """Every GPU profile, by name."""
    return {config.gpu.name: config.gpu for config in composer.profiles()}


@pytest.fixture
def plan(composer: Composer, profiles: dict[str, GpuConfig]) -> Plan:
    """Plan a cell for a device."""

    def plan(*overrides: str, device: Device = H200, catalog: Catalog | None = None) -> Cell:
        return Planner(catalog or Catalog(), profiles, device).plan(composer.cell(overrides))

    return plan


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a sweep over the tiny model, whose every file goes to a folder of its own; all share one MLflow."""
    home = tmp_path_factory.mktemp("sweeps")
    started: list[Sweep] = []

    def start(*overrides: str, after: Sweep | None = None) -> Sweep:
        mark = after.mark if after else f"sweep-{uuid.uuid4().hex}"
        folder = home / mark
        for name in ("cwd", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=after is not None)
        tracking = [f"tracking.uri={database(home)}", f"tracking.artifacts={home}/artifacts"]
        kept = [f"records={folder}/records", f"cache.folder={folder}/cache"]
        fixed = ["model=tiny", "gpu=cpu", "context=32", "protocol.threads=1", *kept, *tracking]
        path = os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH")]))
        # Inductor, once it has compiled in this process, says here where it keeps what it makes.
        inherited = {name: value for name, value in os.environ.items() if name not in KERNELS}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "runner.py"), "-m", *fixed, *overrides],
            cwd=folder / "cwd",
            env=inherited | {"PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "RFLOOR_TEST_MARK": mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Sweep(home, mark, process))
        return started[-1]

    yield start
    for sweep in started:
        for pid, _ in marked(sweep.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sweep.process.wait()
    shutil.rmtree(home)

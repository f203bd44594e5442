"""What several test files share."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Nothing here may wait for a network: a hub id is found in a cache or not at all.
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import pytest
from hypothesis import settings
from planning import H200, Plan
from sweeps import Start, Sweep, database, launch

from registry.architecture import Architecture
from registry.compose import Composer
from registry.hardware import Device
from registry.plan import Cell, Planner
from registry.plugins import Catalog
from registry.schema import GpuConfig

# The example plugin is a distribution of its own, whose tests run in its own environment.
collect_ignore_glob = ["plugin_*/*"]

settings.register_profile("rfloor", deadline=None)
settings.register_profile("fuzz", deadline=None, print_blob=True)  # `make fuzz`; see tests/fuzzing.py
settings.load_profile("rfloor")


MOST_PROCESSES = 4
"""Each starts sweeps of its own, whose workers hold some GB."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `make test` takes: one where there is a GPU, which its tests measure and fill."""
    return 0 if Path("/dev/nvidiactl").exists() else min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


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
    return composer.profiles()


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

    tracking = [f"tracking.uri={database(home)}", f"tracking.artifacts={home}/artifacts"]

    def start(*overrides: str, after: Sweep | None = None, output: int = subprocess.PIPE) -> Sweep:
        started.append(launch(home, tracking, *overrides, after=after, output=output))
        return started[-1]

    yield start
    for sweep in started:
        sweep.kill()
    shutil.rmtree(home)

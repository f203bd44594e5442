"""Each section of a report against tables computed by hand: runs are made up, and their every figure is known."""

import re
from collections.abc import Callable, Sequence

import pytest
from test_report import run

from registry.compose import Composer
from registry.hardware import Device
from registry.plan import Cell, Planner
from registry.plugins import Catalog
from registry.report.document import Section
from registry.report.observation import Observation, pairs
from registry.report.study import study
from registry.schema import ExperimentConfig, GpuConfig

GiB = 1 << 30
DEVICES = {
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", 80 * GiB, "GPU-1", (9, 0), "580.1"),
    "l4": Device("cuda", "NVIDIA L4", 24 * GiB, "GPU-2", (8, 9), "580.1"),
}
Make = Callable[..., Cell]
Named = Callable[[str], ExperimentConfig]


@pytest.fixture(scope="module")
def make(composer: Composer, profiles: dict[str, GpuConfig]) -> Make:
    """A cell of the study's protocol, of its model unless another is named."""

    def make(*overrides: str, gpu: str = "h100") -> Cell:
        planner = Planner(Catalog(), profiles, DEVICES[gpu])
        return planner.plan(composer.cell([f"gpu={gpu}", "model=qwen2.5-7b", "protocol=paper", *overrides]))

    return make


@pytest.fixture(scope="module")
def named(composer: Composer) -> Named:
    return lambda name: composer.cell([f"experiment={name}"]).experiment


def rows(section: Section, table: int = 0) -> list[dict[str, str]]:
    """A table's rows by heading; of headings that are there twice the last."""
    found = section.tables[table]
    return [dict(zip(found.headings, row.cells, strict=True)) for row in found.rows]


def titled(sections: Sequence[Section], title: str) -> Section:
    [found] = [section for section in sections if section.title.startswith(title)]
    return found


def compared(experiment: ExperimentConfig, found: Sequence[Observation]) -> tuple[Section, list[list[str]]]:
    """The study's section, and of each of its rows that has ours: GPU, figure, the study's, ours, ratio."""
    [section] = study(found, pairs(found, experiment), experiment)
    told = [[row[key] for key in ("study's GPU", "figure", "study", "ours", "ours / study")] for row in rows(section)]
    return section, [row for row in told if row[3]]


# Beside the study's figures


def test_a_stack_s_figures_are_those_of_the_plain_body_alone(make: Make, named: Named) -> None:
    """ExLlamaV2's body runs sdpa and eager too, on quantised weights: none of the study's figures is of it."""
    plain = run(make("backend=hf"), 0, 20.0)
    other = run(make("backend=exllamav2", "quant=exl2"), 1, 6.0)
    _, told = compared(named("stack"), [plain, other])
    assert told == [
        ["h100", "median_tpot_ms", "17.07", "20.000", "1.172"],
        ["h100", "r_floor", "0.268", "0.250", "0.933"],
    ]
    assert compared(named("stack"), [other])[1] == []


def test_of_two_cells_that_a_figure_could_be_of_none_is_taken(make: Make, named: Named) -> None:
    found = [run(make("backend=hf", f"protocol.seed={seed}"), seed, 20.0 + seed) for seed in (0, 1)]
    section, told = compared(named("stack"), found)
    assert told[0] == ["h100", "median_tpot_ms", "17.07", "ambiguous", ""]
    assert any(re.search("median_tpot_ms of h100.* is that of seed=0 and of seed=1", text) for text in section.text)

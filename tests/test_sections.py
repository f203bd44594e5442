"""Each section of a report against tables computed by hand: runs are made up, and their every figure is known."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from planning import H200
from rich.console import Console
from test_profile import ONE_PROFILE
from test_report import run

from registry.compose import Composer
from registry.hardware import Device
from registry.outcome import Outcome
from registry.plan import Cell, Planner
from registry.plugins import Catalog
from registry.profile import figures
from registry.report.attention import attention
from registry.report.bandwidth import bandwidth
from registry.report.build import build
from registry.report.document import Section
from registry.report.observation import Observation, cells, pairs
from registry.report.page import html as page
from registry.report.paired import judged
from registry.report.prices import prices
from registry.report.study import study
from registry.report.terminal import tell_report
from registry.schema import ExperimentConfig, GpuConfig

GiB = 1 << 30
DEVICES = {
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", 80 * GiB, "GPU-1", (9, 0), "580.1"),
    "h200": H200,
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


def compared(
    experiment: ExperimentConfig, found: Sequence[Observation], **given: float
) -> tuple[Section, list[list[str]]]:
    """The study's section, and of each of its rows that has ours: GPU, figure, the study's, ours, ratio."""
    [section] = study(found, pairs(found, experiment), experiment, prices(found, given))
    told = [[row[key] for key in ("study's GPU", "figure", "study", "ours", "ours / study")] for row in rows(section)]
    return section, [row for row in told if row[3]]


def arms(make: Make, eager: Sequence[float], graphed: Sequence[float], *overrides: str) -> list[Observation]:
    """Sessions of both launches on a static cache."""
    found: list[Observation] = []
    for session, times in enumerate(zip(eager, graphed, strict=True)):
        for execution, tpot in zip(("eager", "cuda_graph"), times, strict=True):
            cell = make(f"execution={execution}", "execution.cache=static", *overrides)
            found.append(run(cell, len(found), tpot, session=session, experiment="graphs_ab"))
    return found


# Beside the study's figures


def test_the_arms_of_the_study_are_compared_as_means_over_the_sessions(make: Make, named: Named) -> None:
    """14.0, 14.1 and 17.0 ms have the mean 15.033 and the median 14.1; the differences 3.0, 3.0 and 5.8 ms 3.933."""
    _, told = compared(named("graphs_ab"), arms(make, (14.0, 14.1, 17.0), (11.0, 11.1, 11.2)))
    speedup = (14.0 / 11.0 + 14.1 / 11.1 + 17.0 / 11.2) / 3
    assert told == [
        ["h100", "speedup", "1.259", f"{speedup:.3f}", f"{speedup / 1.259:.3f}"],
        # Of 27 resampled means the least and the greatest, the same session three times, are each over 2.5 %.
        ["h100", "speedup_low", "1.253", "1.270", "1.014"],
        ["h100", "speedup_high", "1.267", "1.518", "1.198"],
        ["h100", "speedup_least", "1.245", "1.270", "1.020"],
        ["h100", "speedup_greatest", "1.288", "1.518", "1.178"],
        ["h100", "speedup_cv", "0.009", "0.105", "11.676"],
        ["h100", "difference_ms", "3.05", "3.933", "1.290"],
        ["h100", "difference_share", "0.206", "0.262", "1.270"],
        ["h100", "baseline_ms", "14.83", "15.033", "1.014"],
        ["h100", "baseline_cv", "0.009", "0.113", "12.594"],  # sqrt(2.9033) of 15.033
        ["h100", "baseline_ms", "20.63", "15.033", "0.729"],
        ["h100", "baseline_ms", "27.28", "15.033", "0.551"],
        ["h100", "candidate_ms", "11.78", "11.100", "0.942"],
        ["h100", "candidate_cv", "0.002", "0.00901", "4.505"],  # .1 of 11.1
    ]


@pytest.mark.parametrize(
    ("name", "gpu", "words"),
    [
        ("stack", "l4", ["The study had l4 too, and states none of these figures of it."]),
        ("stack", "h100", []),
        ("quant", "h100", ["The study had h100 too, and states none of these figures of it."]),
        ("matrix", "h200", ["The study did not have h200: its figures stand for comparison, of other GPUs."]),
    ],
)
def test_what_gpus_the_study_had(make: Make, named: Named, name: str, gpu: str, words: list[str]) -> None:
    section, _ = compared(named(name), [run(make(gpu=gpu), 0, 20.0)])
    assert list(section.text)[1:] == words


def test_a_stack_s_figures_are_those_of_the_plain_body_alone(make: Make, named: Named) -> None:
    """ExLlamaV2's body runs sdpa and eager too, on quantised weights: none of the study's figures is of it."""
    plain = run(make("backend=hf"), 0, 20.0)
    other = run(make("backend=exllamav2", "quant=exl2"), 1, 6.0)
    _, told = compared(named("stack"), [plain, other])
    assert told == [
        ["h100", "median_tpot_ms", "17.07", "20.000", "1.172"],
        ["h100", "r_floor", "0.268", "0.250", "0.933"],
        ["h100", "median_tpot_ms", "28.44", "20.000", "0.703"],
    ]
    assert compared(named("stack"), [other])[1] == []


def test_of_two_cells_that_a_figure_could_be_of_none_is_taken(make: Make, named: Named) -> None:
    found = [run(make("backend=hf", f"protocol.seed={seed}"), seed, 20.0 + seed) for seed in (0, 1)]
    section, told = compared(named("stack"), found)
    assert told[0] == ["h100", "median_tpot_ms", "17.07", "ambiguous", ""]
    assert any(re.search("median_tpot_ms of h100.* is that of seed=0 and of seed=1", text) for text in section.text)


@pytest.mark.parametrize("other", ["model=mistral-7b-v0.3", "context=4096", "protocol.batch_size=2", "quant=nf4"])
@pytest.mark.parametrize("name", ["graphs_ab", "batch4", "stack", "quant", "profile", "matrix"])
def test_another_model_s_context_s_or_quantisation_s_step_is_no_figure_of_the_study(
    make: Make, named: Named, name: str, other: str
) -> None:
    """A figure that leaves out what it is of would take whatever was measured."""
    experiment = named(name)
    for gpu in ("h100", "l4"):
        found = []
        for execution in ("eager", "cuda_graph"):
            one = run(make(other, f"execution={execution}", "execution.cache=static", gpu=gpu), len(found), 20.0)
            one.record.metrics |= {"bw_util": 0.25, "cpu_cuda_ratio": 0.7, "peak_memory_gb": 1.0}
            found.append(one)
        wrong = [
            figure
            for figure, row in zip(
                experiment.study,
                study(found, pairs(found, experiment), experiment, {})[0].tables[0].rows,
                strict=True,
            )
            if row.runs and not figure.over and not _may_be(figure.where, other)
        ]
        assert wrong == []


def _may_be(where: dict[str, Any], override: str) -> bool:
    """Whether a figure is stated of what an override chooses."""
    key, _, value = override.partition("=")
    dotted = {"model": "model.name", "quant": "quant.name", "context": "protocol.context"}.get(key, key)
    return str(where.get(dotted)) == value


TWELVE = [
    (model, context)
    for model in ("qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b")
    for context in (2048, 4096, 8192, 16384)
]


def test_the_least_of_twelve_cells_is_compared_with_the_least_of_twelve(make: Make, named: Named) -> None:
    """Steps of 10, 11 ... 21 ms have floors over steps of 5/10 ... 5/21; their median is between 5/15 and 5/16."""
    found = [
        run(make(f"model={model}", f"context={context}"), place, 10.0 + place)
        for place, (model, context) in enumerate(TWELVE)
    ]
    section, told = compared(named("matrix"), found)
    assert told == [
        ["h100", "min r_floor", "0.19", "0.238", "1.253"],
        ["h100", "median r_floor", "0.26", "0.323", "1.242"],
        ["h100", "max r_floor", "0.31", "0.500", "1.613"],
        ["h100", "median_tpot_ms", "16.97", "10.000", "0.589"],
        ["h100", "r_floor", "0.27", "0.500", "1.852"],
    ]
    assert {row["our cells"] for row in rows(section) if row["ours"]} == {"12 of 12", ""}
    # Another quantisation's cells are none of the twelve; eleven are no twelve.
    extra = [run(make("quant=nf4"), 20, 2.0), *found[1:]]
    section, told = compared(named("matrix"), extra)
    assert [row[1:] for row in told] == [
        ["min r_floor", "0.19", "0.238", ""],
        ["median r_floor", "0.26", "0.312", ""],
        ["max r_floor", "0.31", "0.455", ""],
    ]
    assert {row["our cells"] for row in rows(section) if row["ours"]} == {"11 of 12"}


def test_the_l4_s_eight_cells_are_compared_with_eight_of_ours(make: Make, named: Named) -> None:
    """Four of the twelve were out of memory there; which eight are left differs from place to place in the study."""
    found = [
        run(make(f"model={model}", f"context={context}", gpu="l4"), place, 10.0 + place)
        for place, (model, context) in enumerate(TWELVE[:9])
    ]
    section, told = compared(named("matrix"), found[:8])
    assert [row[1:] for row in told if row[1].endswith("n r_floor")] == [
        ["min r_floor", "0.354", "0.294", "0.831"],  # 5 of 17
        ["median r_floor", "0.694", "0.371", "0.534"],  # between 5 of 13 and 5 of 14
    ]
    assert {row["our cells"] for row in rows(section) if "max" in row["figure"] and row["ours"]} == {
        "8 of 12, the study's 8"
    }
    assert {row[4] for row in compared(named("matrix"), found)[1] if row[1].startswith("m") and "min" in row[1]} == {
        ""
    }


def test_a_batch_is_compared_by_what_it_takes_longer_and_brings(make: Make, named: Named) -> None:
    """Graphed 10 ms at batch 1 and 16 ms at batch 4: 1.6 times as long, 2.5 times the tokens; eager is not meant."""
    found = arms(make, (20.0,), (10.0,))
    found += [
        dataclasses.replace(one, run_id=f"four{one.run_id}")
        for one in arms(make, (24.0,), (16.0,), "protocol.batch_size=4")
    ]
    _, told = compared(named("batch4"), found)
    assert [row[1:] for row in told if "over" in row[1]] == [
        ["latency_over_batch_1", "1.25", "1.600", "1.280"],
        ["throughput_over_batch_1", "3.2", "2.500", "0.781"],
    ]
    assert not [row for row in compared(named("batch4"), found[2:])[1] if "over" in row[1]]


@pytest.mark.parametrize(
    ("ended", "contexts", "words"),
    [
        ("oom", (2048, 4096, 8192, 16384), ["oom", "4 of 4", "oom", "same"]),
        ("oom", (2048, 4096), ["oom", "2 of 4", "oom", ""]),
        ("ok", (2048, 4096), ["oom", "2 of 4", "ok", "other"]),
    ],
)
def test_how_cells_ended_is_a_figure_too(
    make: Make, named: Named, ended: str, contexts: Sequence[int], words: list[str]
) -> None:
    found = []
    for place, context in enumerate(contexts):
        cell = make("protocol.batch_size=4", f"context={context}", gpu="l4")
        found.append(run(cell, place, 60.0, outcome=Outcome(ended)))
    section, _ = compared(named("batch4"), found)
    [row] = [row for row in rows(section) if row["figure"] == "outcome"]
    assert [row[key] for key in ("study", "our cells", "ours", "ours / study")] == words
    assert row["study's GPU"] == "l4"


def test_a_speedup_over_the_plain_eager_cell_is_compared(make: Make, named: Named) -> None:
    """20 ms eager and 12.5 ms in a graph: 1.6 times as fast; a graph with another kernel is not meant."""
    levers = {"execution=eager": 20.0, "execution=cuda_graph": 12.5}
    found = [run(make(lever), place, tpot) for place, (lever, tpot) in enumerate(levers.items())]
    found.append(run(make("execution=cuda_graph", "attention=flashinfer"), 2, 11.0))
    _, told = compared(named("stack"), found)
    assert [row[1:] for row in told if row[1] == "speedup_over_plain"] == [
        ["speedup_over_plain", "1.43", "1.600", "1.119"]
    ]


def test_a_second_cell_of_the_twelve_s_kind_makes_them_ambiguous(make: Make, named: Named) -> None:
    found = [run(make(f"protocol.warmup_steps={steps}"), steps, 20.0) for steps in (1, 5)]
    _, told = compared(named("matrix"), found)
    assert {row[3] for row in told} == {"ambiguous"}


# Dollars


def test_the_study_s_dollars_are_beside_the_ladder_s_cheapest_cell_at_the_ladder_s_price(
    make: Make, named: Named
) -> None:
    """36 $/h are 0.01 $ a second, so a token of 10 ms is a ten-thousandth of a dollar: 100 $ a million."""
    times = {"execution=eager": 20.0, "execution=cuda_graph": 12.0, "attention=flashinfer": 10.0}
    found = [run(make(lever), place, tpot) for place, (lever, tpot) in enumerate(times.items())]
    section, told = compared(named("cost"), found, h100=36.0)
    assert told == [["h100", "usd_per_mtok", "11.45", "100.000", "8.734"]]
    assert section.text[-1] == (
        "Ours beside the 11.45 usd_per_mtok of h100 is of hf none flashinfer eager at 36.00 $/h."
    )
    both = [*found, run(make("backend=exllamav2", "quant=exl2", gpu="l4"), 3, 50.0)]
    section, told = compared(named("cost"), both, h100=36.0, l4=3.6)
    assert [row[1:] for row in told if "over" in row[1]] == [
        ["usd_per_mtok_over_l4", "7.9", "2.000", "0.253"],
        ["usd_per_mtok_over_l4", "6", "2.000", "0.333"],
    ]
    assert section.text[-1] == (
        "Ours beside the 6 usd_per_mtok_over_l4 of h100 is of hf none flashinfer eager at 36.00 $/h over "
        "exllamav2 exl2 sdpa eager at 3.60 $/h."
    )
    [row] = rows(titled(build(named("cost"), found, prices={"h100": 36.0}).sections, "$/Mtok"))
    assert (row["$/h"], row["TPOT ms"], row["within"], row["across"], row["$/Mtok"], row["times the cheapest"]) == (
        "36.00",
        "10.00",
        "10.00%",
        "",
        "100.00",
        "1.00",
    )


def test_a_lever_that_two_builds_measured_counts_by_the_one_with_more_sessions(make: Make, named: Named) -> None:
    """At 0.01 $ a second 10 ms cost 100 $ a million tokens. The other build's 8 ms are one session's, or older."""

    def told(*runs: tuple[str, int, float]) -> list[str]:
        found = []
        for place, (build_, session, tpot) in enumerate(runs):
            one = run(make("execution=cuda_graph"), place, tpot, session=session)
            found.append(elsewhere(one, place, build_ * 16))
        found.append(run(make("execution=eager"), 20, 20.0))
        section = titled(build(named("cost"), found, prices={"h100": 36.0}).sections, "$/Mtok")
        return [row["$/Mtok"] for row in rows(section)]

    most = [("a", 0, 10.0), ("a", 1, 10.0)]
    assert told(("b", 0, 8.0), *most) == told(*most, ("b", 0, 8.0)) == ["100.00"]
    assert told(("a", 0, 8.0), ("b", 0, 10.0)) == ["100.00"]
    assert told(("a", 0, 10.0), ("b", 0, 8.0)) == ["80.00"]


def test_another_value_makes_another_lever_and_a_key_that_a_record_lacks_does_not(make: Make, named: Named) -> None:
    def told(options: dict[str, int]) -> str:
        found = [run(make("execution=cuda_graph"), place, tpot) for place, tpot in ((0, 8.0), (1, 10.0))]
        for place, one in enumerate(found):
            one.record.cell_id = f"{place}" * 16
            one.record.config["quant"] = one.record.config["quant"] | {"options": [{"size": 1}, options][place]}
        [row] = rows(titled(build(named("cost"), found, prices={"h100": 36.0}).sections, "$/Mtok"))
        return row["$/Mtok"]

    assert told({"size": 2}) == "80.00"
    assert told({"size": 1}) == told({}) == "100.00"


def test_a_gpu_has_one_price_the_newest_record_s_or_the_one_that_is_given(make: Make, named: Named) -> None:
    """3.6 and 7.2 $/h: at 7.2 $/h a step of 10 ms costs 20 $ a million tokens, one of 20 ms costs 40 $."""
    found = [
        run(make("gpu.price_usd_per_hour=3.6"), 0, 20.0),
        run(make("gpu.price_usd_per_hour=7.2", "execution=cuda_graph"), 1, 10.0),
    ]
    for order in (found, found[::-1]):
        assert prices(order, {}) == {"h100": 7.2}
        told = rows(titled(build(named("stack"), order).sections, "Cells"))
        assert sorted(row["$/Mtok"] for row in told) == ["20.00", "40.00"]
    assert prices(found, {"h100": 1.0}) == {"h100": 1.0}


# Attention


def call(cell: Cell, number: int, us: float, layers_ms: float, **changes: Any) -> Observation:
    """A kernel alone: three calls with the median `us`, 8.4 MB each."""
    one = run(cell, number, 1.0, kind="attention", step_times_ms=[], **changes)
    one.record.call_times_us = [us * 0.9, us, us * 1.1]
    one.record.metrics = {
        "median_call_us": us,
        "event_median_call_us": us / 2,
        "layers_total_ms": layers_ms,
        "call_bytes": 8.4e6,
        "call_gbs": 8.4e6 / us / 1e3,
        "output_cosine": 0.99999,
    }
    one.record.measured = {
        "sdp_enabled": {"flash": True, "cudnn": False},
        "calls_a_launch": 32 if cell.config.execution.name == "cuda_graph" else 1,
    }
    return one


KERNEL = ("protocol=attention", "execution.cache=dynamic")


def test_attention_s_table(make: Make) -> None:
    """Calls of 40, 42 and 44 us, 28 layers' of 1.12, 1.176 and 1.232 ms; the step's second visit takes 8.4 ms."""
    kernels = [
        call(make(*KERNEL), place, us, us * 28 / 1e3, session=place) for place, us in enumerate((40.0, 42.0, 44.0))
    ]
    step = run(make(), 3, 16.8)
    section = titled(attention([*kernels, step]), "Kernels")
    [row] = rows(section)
    assert (row["n"], row["us/call"], row["events us/call"], row["all layers ms"]) == (
        "3/3",
        "42.00",
        "21.00",
        "1.176",
    )
    assert (row["share of step"], row["MB/call"], row["GB/s"], row["cosine"]) == ("14.0%", "8.40", "200", "0.99999")
    assert row["across"] == "4.76%"  # 2 of 42
    assert section.text[-1] == "What scaled_dot_product_attention may choose from in a call. sdpa: flash."
    assert "revisit_median_tpot_ms" in section.text[1]
    assert row["within"] == "10.00%"
    [row] = rows(attention([call(make(*KERNEL, "execution=cuda_graph"), 0, 4.0, 0.112)])[0])
    assert (row["within"], row["us/call"], row["across"]) == ("10.00% of 32-call means", "4.00", "")


def test_a_picture_of_kernels_has_a_point_for_each(make: Make) -> None:
    found = [call(make(*KERNEL, f"context={context}"), context // 2048, 40.0, 1.12) for context in (2048, 4096)]
    section = attention(found)[0]
    [figure] = section.figures() if section.figures else []
    assert [list(points.y) for points in figure.data] == [["sdpa context=2048", "sdpa context=4096"], []]
    assert list(figure.data[0].hovertext) == ["run run01", "run run02"]
    ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert ticks == {"10": 10, "20": 20, "50": 50, "100": 100, "200": 200, "500": 500}


@pytest.mark.parametrize(
    ("execution", "cache"), [("eager", "dynamic"), ("eager", "static"), ("cuda_graph", "static")]
)
def test_a_share_is_of_the_step_that_is_launched_in_the_same_way(make: Make, execution: str, cache: str) -> None:
    """28 calls of 40 us are 1.12 ms of the second visit's 8.4; the calls' cache is always dynamic."""
    kernel = call(make(*KERNEL, f"execution={execution}"), 0, 40.0, 1.12)
    step = run(make(f"execution={execution}", f"execution.cache={cache}"), 1, 16.8)
    [section] = attention([kernel, step])
    assert [row["share of step"] for row in rows(section)] == ["13.3%"]
    assert "the cache of a step in a graph is static" in section.text[1]


@pytest.mark.parametrize(
    "other", ["attention=sdpa-math", "quant=nf4", "backend=exllamav2", "execution=cuda_graph", "context=4096"]
)
def test_a_share_is_of_the_plain_step_and_of_no_other(make: Make, other: str) -> None:
    kernel = call(make(*KERNEL, "attention=sdpa-flash"), 0, 40.0, 1.12)
    assert [row["share of step"] for row in rows(attention([kernel, run(make(other), 1, 16.8)])[0])] == [""]


def test_of_two_plain_steps_there_is_no_share(make: Make) -> None:
    steps = [run(make(f"protocol.seed={seed}"), seed, 16.8) for seed in (1, 2)]
    assert [row["share of step"] for row in rows(attention([call(make(*KERNEL), 0, 40.0, 1.12), *steps])[0])] == [""]


@pytest.mark.parametrize("other", ["model=mistral-7b-v0.3", "context=4096", "protocol.batch_size=2", "quant=nf4"])
def test_a_claim_is_of_the_study_s_cell(make: Make, named: Named, other: str) -> None:
    experiment = named("graphs_ab")
    made = [judged(pairs(arms(make, (14.0,), (11.0,), *more), experiment), experiment) for more in ((), (other,))]
    assert [len(one) for one in made] == [1, 0]


# What one cell is, and what it is called


def elsewhere(one: Observation, number: int, cell_id: str, **changes: Any) -> Observation:
    """The same configuration measured with other code, software or on another device, in another sweep."""
    environment = one.record.environment | changes
    told = {"cell_id": cell_id, "environment": environment, "record_id": f"r{number}", "sweep_id": "another"}
    return Observation(dataclasses.replace(one.record, **told), f"run{number}")


def test_sessions_with_other_software_are_no_sessions_of_one_cell(make: Make, named: Named) -> None:
    first = arms(make, (14.0, 15.0), (11.0, 12.0))
    newer = [
        elsewhere(one, 10 + place, f"{place % 2:016}", versions={"torch": "2.99"}) for place, one in enumerate(first)
    ]
    experiment = named("graphs_ab")
    assert [len(one.observations) for one in cells([*first, *newer])] == [2, 2, 2, 2]
    section = titled(build(experiment, [*first, *newer]).sections, "eager against")
    assert [(row["block"], row["sessions"]) for row in rows(section)] == [
        ("h100, qwen2.5-7b, ctx 2048, batch 1, torch=2.13.0", "2"),
        ("h100, qwen2.5-7b, ctx 2048, batch 1, torch=2.99", "2"),
    ]


@pytest.mark.parametrize(
    ("changes", "axis", "values"),
    [
        ({"versions": {"torch": "2.99"}}, "torch", {"2.13.0", "2.99"}),
        ({"git": {"commit": "deadbeefdead", "dirty": "false"}}, "commit", {"c0ffee", "deadbeef"}),
        ({"git": {"commit": "c0ffee", "dirty": "true"}}, "dirty", {"false", "true"}),
        ({"device": {"name": "NVIDIA L4", "driver": "999"}}, "driver", {"570.86.15", "999"}),
        ({}, "cell", set()),
    ],
)
def test_cells_of_one_configuration_are_told_apart_by_what_differs(
    make: Make, named: Named, changes: dict[str, Any], axis: str, values: set[str]
) -> None:
    one = run(make(), 0, 20.0)
    found = [one, elsewhere(one, 1, "f" * 16, **changes)]
    told = rows(titled(build(named("matrix"), found).sections, "Cells"))
    assert {row[axis] for row in told} == (values or {one.record.cell_id[:8], "ffffffff"})


def test_a_price_makes_no_other_cell(make: Make) -> None:
    found = [run(make(f"gpu.price_usd_per_hour={price}"), price, 20.0, session=price) for price in (1, 2)]
    assert len(cells(found)) == 1


def test_a_cell_that_was_asked_for_twice_is_two_and_no_run_of_it_is_lost(make: Make, named: Named) -> None:
    """14 and 11 ms, then once more 16 and 10 ms in the same session."""
    found = [*arms(make, (14.0,), (11.0,)), *arms(make, (16.0,), (10.0,))]
    for place, one in enumerate(found):
        one.record.started_at, one.record.index = f"2026-07-01T10:{place:02}:00+00:00", place
    told = rows(titled(build(named("graphs_ab"), found).sections, "eager against"))
    assert [(row["block"][-6:], row["speedup"]) for row in told] == [("copy=0", "1.2727"), ("copy=1", "1.6000")]


def test_a_dynamic_cache_s_baseline_is_another_pair_s(make: Make, named: Named) -> None:
    """Three sessions of each baseline beside the one candidate: 14 / 11 and 50 / 11, never 9 sessions or 3 mixed."""
    static = arms(make, (14.0,) * 3, (11.0,) * 3)
    dynamic = [run(make("execution.cache=dynamic"), 10 + place, 50.0, session=place) for place in range(3)]
    for found in ([*static, *dynamic], [*dynamic, *static]):
        told = rows(titled(build(named("graphs_ab"), found).sections, "eager against"))
        assert [(row["block"].rpartition(", ")[2], row["sessions"], row["speedup"]) for row in told] == [
            ("cache=dynamic", "3", "4.5455"),
            ("cache=static", "3", "1.2727"),
        ]


VARIANTS = (
    "",
    "execution.cache=static",
    "execution=cuda_graph",
    "protocol.warmup_steps=1",
    "protocol.measured_steps=1",
    "protocol.seed=5",
    "protocol.threads=2",
    "protocol.batch_size=2",
    "protocol.batch_size=2 protocol.seed=5",
    "quant=nf4",
    "quant=nf4 protocol.batch_size=2",
    "quant=nf4 quant.options.block_size=128",
    "quant=nf4 execution=cuda_graph",
    "attention=sdpa-math",
    "attention=sdpa-math protocol.batch_size=2",
    "execution=compile",
    "execution=compile execution.mode=max-autotune-no-cudagraphs",
    "model=tiny",
    "model.layers=2",
    "context=4096",
)


@pytest.mark.parametrize(
    "name", ["graphs_ab", "batch4", "matrix", "quant", "stack", "profile", "attention", "cost", "floor"]
)
def test_no_two_rows_have_one_label(make: Make, named: Named, name: str) -> None:
    """Of cells that differ in every way in which cells can, no table has two rows that read the same at the left."""
    found: list[Observation] = []
    for overrides in VARIANTS:
        one = run(make(*overrides.split()), len(found), 20.0 + len(found), experiment=name)
        one.record.measured = {"profile": ONE_PROFILE}
        found += [one, elsewhere(one, 100 + len(found), f"{len(found):016}", versions={"torch": "2.99"})]
        if not overrides.startswith(("execution.cache", "execution=compile")):
            kernel = make(*KERNEL, *overrides.split())
            found.append(call(kernel, len(found), 40.0 + len(found), 1.12, experiment=name))
    sections = build(named(name), found).sections
    for section in sections:
        for table in section.tables:
            if section.title.startswith(("The study", "Kernels of")):
                continue
            labels = Counter(tuple(row.cells[: table.text_columns]) for row in table.rows)
            assert [told for told, count in labels.items() if count > 1] == [], section.title
    titles = Counter(section.title for section in sections)
    assert [title for title, count in titles.items() if count > 1] == []


@pytest.mark.parametrize("name", ["graphs_ab", "batch4", "matrix", "quant", "stack", "profile", "attention", "cost"])
def test_kernels_alone_are_left_out_of_what_tells_of_steps(make: Make, named: Named, name: str) -> None:
    """A call may ask any experiment to measure kernels alone; its report tells of the steps that there are."""
    kernels = [
        call(make(*KERNEL, f"execution={execution}"), place, 40.0, 1.12, experiment=name)
        for place, execution in enumerate(("eager", "cuda_graph"))
    ]
    told = build(named(name), kernels)
    page(told)
    if name == "cost":
        return
    words = "left out of .*: 2 runs of attention kernels alone"
    assert any(re.fullmatch(words, fact) for fact in told.facts) == (name != "attention")
    steps = arms(make, (14.0,), (11.0,))
    told, without = build(named(name), [*steps, *kernels]), build(named(name), steps)
    page(told)
    for section in without.sections:
        if section.title in ("eager against cuda_graph", "Sessions", "Cells", "Batch size", "R_floor of each GPU"):
            assert rows(titled(told.sections, section.title)) == rows(section)


def test_a_session_is_called_by_its_own_number(make: Make, named: Named) -> None:
    """Of sessions 0, 1 and 2 the first lost an arm: 1 and 2 are left, and are not 0 and 1."""
    found = arms(make, (14.0, 15.0, 16.0), (11.0, 12.0, 10.0))[1:]
    told = rows(titled(build(named("graphs_ab"), found).sections, "Sessions"))
    assert [(row["session"], row["eager ms"], row["cuda_graph ms"], row["speedup"]) for row in told] == [
        ("1", "15.000", "12.000", "1.2500"),
        ("2", "16.000", "10.000", "1.6000"),
    ]
    more = arms(make, (20.0,), (10.0,))
    for one in more:
        one.record.sweep_id = "later"
    told = rows(titled(build(named("graphs_ab"), [*found, *more]).sections, "Sessions"))
    assert [(row["sweep"], row["session"]) for row in told] == [
        ("20260701-101010-abcd", "1"),
        ("20260701-101010-abcd", "2"),
        ("later", "0"),
    ]


# What a report says beside its figures


def test_facts_tell_code_software_and_protocol(make: Make, named: Named) -> None:
    one, other = run(make(), 0, 20.0), run(make("execution=cuda_graph"), 1, 20.0)
    one.record.environment = {
        "device": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1"},
        "versions": {"torch": "2.13.0", "rfloor": "0.1.0", "gptqmodel": "7.6.0"},
        "git": {"commit": "0123456789abcdef", "dirty": "true"},
    }
    other.record.started_at = "2026-07-03T10:00:00.000+00:00"
    told = build(named("matrix"), [one, other]).facts
    assert told == [
        "device: NVIDIA H100 80GB HBM3, NVIDIA L4",
        "driver: 580.1, 570.86.15",
        "torch: 2.13.0",
        "transformers: not known",
        "rfloor: 0.1.0",
        "gptqmodel: 7.6.0",
        "rfloor's commit: 0123456789ab with changes that are in no commit, c0ffee",
        "measured: 2026-07-01 to 2026-07-03",
        "every cell: model=qwen2.5-7b gpu=h100 backend=hf quant=none attention=sdpa context=2048 batch_size=1 seed=0 "
        "warmup_steps=5 measured_steps=30",
    ]
    assert "measured: 2026-07-01" in build(named("matrix"), [one]).facts


@pytest.mark.parametrize("name", ["graphs_ab", "batch4", "matrix", "quant", "stack", "attention"])
def test_what_was_not_measured_is_told_with_its_reason(make: Make, named: Named, name: str) -> None:
    """A session that was lost leaves a pair with fewer sessions: the reader is told why."""
    found = arms(make, (14.0, 15.0), (11.0, 12.0))
    lost = {"outcome": Outcome.OOM, "reason": "takes 81 GB of 80", "metrics": {}, "step_times_ms": []}
    found[3] = Observation(dataclasses.replace(found[3].record, **lost), "lost")
    [row] = rows(titled(build(named(name), found).sections, "Not measured"))
    assert (row["execution"], row["outcome"], row["why"]) == ("cuda_graph", "ok x1, oom x1", "takes 81 GB of 80")
    assert not [one for one in build(named(name), found[:3]).sections if one.title == "Not measured"]


@pytest.mark.parametrize("name", ["graphs_ab", "batch4", "matrix", "quant", "stack", "profile", "cost", "attention"])
def test_a_warning_is_told_once_with_its_cells_and_runs(make: Make, named: Named, name: str) -> None:
    found = arms(make, (14.0, 15.0), (11.0, 12.0))
    if name == "attention":
        found.append(call(make(*KERNEL), 9, 40.0, 1.12))
    for one in found:
        one.record.measured |= {"profile": ONE_PROFILE}
        one.record.warnings = ["throttled by power"]
    found[0].record.warnings.append("unsteady")
    told = build(named(name), found)
    section = titled(told.sections, "What weakens it")
    assert [row["warning"] for row in rows(section)] == ["throttled by power", "unsteady"][
        : len(section.tables[0].rows)
    ]
    traced = {one.trace for row in section.tables[0].rows for one in row.runs}
    assert traced == set(told.numbered())
    if name == "graphs_ab":
        assert [row["cells"] for row in rows(section)] == ["eager; cuda_graph", "eager"]
        assert [len(row.runs) for row in section.tables[0].rows] == [4, 1]
    assert not [one for one in build(named(name), [run(make(), 0)]).sections if one.title == "What weakens it"]


def test_warnings_that_differ_in_their_numbers_are_one(make: Make, named: Named) -> None:
    found = arms(make, (14.0, 15.0), (11.0, 12.0))
    clocks = (1665, 1980, 1650, 1710)
    for one, clock in zip(found, clocks, strict=True):
        one.record.warnings = [f"throttled: SM clock {clock} of 1980 MHz", f"torch 2.{clock}.0 is old"]
    first, *others = rows(titled(build(named("graphs_ab"), found).sections, "What weakens it"))
    assert first["warning"] == "throttled: SM clock 1650 to 1980 of 1980 MHz"
    assert first["cells"] == "eager; cuda_graph"
    assert len(others) == 4


# Tables by hand


def test_batches_table(make: Make, named: Named) -> None:
    """Batch 1 takes 10 ms (sessions of 9, 10 and 12), batch 4 16 ms: 1.6 times as long, 250 tokens a second, 2.5
    times the 100 of batch 1."""
    found = [run(make(), place, tpot, session=place) for place, tpot in enumerate((9.0, 10.0, 12.0))]
    found.append(run(make("protocol.batch_size=4"), 3, 16.0))
    section = titled(build(named("batch4"), found).sections, "Batch size")
    keys = ("GPU", "model", "execution", "context", "batch", "TPOT ms", "within", "across")
    assert [[row[key] for key in keys] for row in rows(section)] == [
        ["h100", "qwen2.5-7b", "eager", "2048", "1", "10.00", "10.00%", "14.78%"],  # sqrt(7/3) of 31/3
        ["h100", "qwen2.5-7b", "eager", "2048", "4", "16.00", "10.00%", ""],
    ]
    assert [[row[key] for key in ("latency", "tok/s", "throughput")] for row in rows(section)] == [
        ["x1.00", "100.0", "x1.00"],
        ["x1.60", "250.0", "x2.50"],
    ]
    assert [len(row.runs) for row in section.tables[0].rows] == [6, 4]


@pytest.mark.parametrize(
    "other", ["quant=nf4", "attention=sdpa-math", "execution.cache=static", "protocol.warmup_steps=1", "context=4096"]
)
def test_a_batch_is_set_against_batch_1_of_its_own_cell(make: Make, named: Named, other: str) -> None:
    """10 and 11 ms of the one kind, 20 and 24 ms of the other: x1.10 and x1.20, whichever comes first."""
    times = {("", 1): 10.0, ("", 2): 11.0, (other, 1): 20.0, (other, 2): 24.0}
    found = [
        run(make(*kind.split(), f"protocol.batch_size={batch}"), place, tpot)
        for place, ((kind, batch), tpot) in enumerate(times.items())
    ]
    for order in (found, found[::-1], found[:3], found[1:]):
        told = rows(titled(build(named("batch4"), order).sections, "Batch size"))
        for row in told:
            assert (
                row["latency"]
                == {"10.00": "x1.00", "11.00": "x1.10", "20.00": "x1.00", "24.00": "x1.20"}[row["TPOT ms"]]
            )
    section = titled(build(named("batch4"), found[1:]).sections, "Batch size")
    assert len(rows(section)) == 2
    assert section.text[-1] == "Without one cell of batch 1 to be set against: 1 cells."


def test_matrix_s_tables(make: Make, named: Named) -> None:
    """Three cells of 10, 20 and 50 ms; the first in sessions of 9, 10 and 14. R is 5 ms over each."""
    found = [run(make(), place, tpot, session=place) for place, tpot in enumerate((9.0, 10.0, 14.0))]
    found += [run(make("context=4096"), 3, 20.0), run(make("model=mistral-7b-v0.3"), 4, 50.0)]
    cells_, least = (titled(build(named("matrix"), found).sections, title) for title in ("Cells", "R_floor"))
    keys = ("model", "context", "n", "TPOT ms", "again ms", "r_floor", "within", "across")
    assert [[row[key] for key in keys] for row in rows(cells_)] == [
        ["mistral-7b-v0.3", "2048", "1/1", "50.00", "25.00", "0.100", "10.00%", ""],
        ["qwen2.5-7b", "2048", "3/3", "10.00", "5.00", "0.500", "10.00%", "24.05%"],  # sqrt(7) of 11
        ["qwen2.5-7b", "4096", "1/1", "20.00", "10.00", "0.250", "10.00%", ""],
    ]
    first = {"min": "0.100", "median": "0.250", "max": "0.500"}
    again = {"again min": "0.200", "again median": "0.500", "again max": "1.000"}
    assert rows(least) == [{"GPU": "h100", "cells": "3", **first, **again}]
    [figure] = cells_.figures() if cells_.figures else []
    assert figure.data[0].z == ([0.1, None], [0.5, 0.25])


@pytest.mark.parametrize("name", ["floor", "body"])
def test_bandwidth_is_of_what_a_step_streams(
    make: Make, named: Named, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 GB in 10 ms; in sessions of 9, 10 and 14 the median, sqrt(7) of 11 the spread across them. A cell without
    figures has no row here."""
    found = [run(make(), place, tpot, session=place) for place, tpot in enumerate((9.0, 10.0, 14.0))]
    for place, one in enumerate(found):
        streamed = {"streamed_bytes": 12e9, "mbu": 0.3 + place / 10, "mbu_attainable": 0.5 + place / 10}
        one.record.metrics |= streamed
    found.append(run(make("quant=nf4"), 3, outcome=Outcome.OOM, metrics={}))
    told = build(named(name), found)
    section = titled(told.sections, "Bandwidth")
    assert [[*row.values()] for row in rows(section)] == [
        ["qwen2.5-7b", "10.000", "10.00%", "24.05%", "12.000", "0.400", "0.600", "0.500"]
    ]
    assert [*rows(section)[0]][1:4] == ["TPOT ms", "within", "across"]
    assert len(section.tables[0].rows[0].runs) == 3
    assert "r_floor counts by the study's convention" in section.text[0]
    [figure] = section.figures() if section.figures else []
    assert [(trace.name, [*trace.x]) for trace in figure.data] == [("mbu att.", [0.6]), ("mbu", [0.4])]
    monkeypatch.setattr("registry.report.terminal.console", lambda: Console(width=60))
    tell_report(told, [])
    shown = capsys.readouterr().out
    assert re.search(r"TPOT ms +streamed GB +mbu +mbu att\. +r_floor", shown), "whatever the window's width"
    assert bandwidth(found[3:]) == []


def test_each_quantisation_s_cells_have_a_distribution_and_a_map_of_their_own(make: Make, named: Named) -> None:
    found = [run(make(), 0, 10.0), run(make("quant=nf4"), 1, 20.0), run(make("quant=nf4", "context=4096"), 2, 50.0)]
    cells_, least = (titled(build(named("matrix"), found).sections, title) for title in ("Cells", "R_floor"))
    assert [(row["quant"], row["cells"], row["min"], row["max"]) for row in rows(least)] == [
        ("none", "1", "0.500", "0.500"),
        ("nf4", "2", "0.100", "0.250"),
    ]
    maps = [figure.data[0].z for figure in (cells_.figures() if cells_.figures else [])]
    assert maps == [([0.5],), ([0.25, 0.1],)]
    figures = cells_.figures() if cells_.figures else []
    assert {figure.data[0].zmax for figure in figures} == {0.5}
    assert {figure.layout.yaxis.autorange for figure in figures} == {"reversed"}
    assert [figure.data[0].customdata for figure in figures] == [(["run run00"],), (["run run01", "run run02"],)]


def test_variants_table(make: Make, named: Named) -> None:
    """The plain step takes 20 ms, its second visit 10; nf4's 16 ms (sessions of 15, 16 and 18), again 12 ms: it is
    1.25 times as fast on the first visit and .83 times on the second."""
    found = [run(make(), 0, 20.0)]
    for session, tpot in enumerate((15.0, 16.0, 18.0)):
        found.append(run(make("quant=nf4"), session + 1, tpot, session=session))
        found[-1].record.metrics |= {"revisit_median_tpot_ms": 12.0, "peak_memory_gb": 6.96, "mbu": 0.3}
    section = titled(build(named("quant"), found, prices={"h100": 3.6}).sections, "Cells")
    keys = ("quant", "n", "TPOT ms", "range", "within", "across", "speedup", "again ms", "speedup again")
    assert [[row[key] for key in keys] for row in rows(section)] == [
        ["none", "1/1", "20.00", "20.00-20.00", "10.00%", "", "1.00", "10.00", "1.00"],
        ["nf4", "3/3", "16.00", "15.00-18.00", "10.00%", "9.35%", "1.25", "12.00", "0.83"],  # sqrt(7/3) of 49/3
    ]
    told = rows(section)[1]
    assert [told[key] for key in ("r_floor", "mbu", "peak GB", "$/Mtok")] == ["0.312", "0.300", "6.96", "16.00"]


def test_a_stack_s_launches_are_set_against_the_plain_eager_step(make: Make, named: Named) -> None:
    """20 ms eager; 16 ms compiled in 31.4 s, with another kernel 10 ms: 1.25 and 2 times as fast."""
    found = [run(make(), 0, 20.0), run(make("execution=compile"), 1, 16.0)]
    found.append(run(make("execution=compile", "attention=sdpa-math"), 2, 10.0))
    found.append(run(make("execution=compile", "attention=fa2"), 3, outcome=Outcome.CRASH, metrics={}))
    for one in found[1:3]:
        one.record.metrics["compile_s"] = 31.4
    told = rows(titled(build(named("stack"), found).sections, "Cells"))
    assert {(row["TPOT ms"], row["speedup"], row["over eager"], row["compile s"]) for row in told} == {
        ("20.00", "1.00", "1.00", ""),
        ("16.00", "1.00", "1.25", "31.4"),
        ("10.00", "1.60", "2.00", "31.4"),
        ("", "", "", ""),
    }
    assert "compile s" not in titled(build(named("stack"), found[:1]).sections, "Cells").tables[0].headings


@pytest.mark.parametrize("other", ["execution.cache=static", "protocol.seed=5", "context=4096", "model=tiny"])
def test_a_speedup_is_over_the_plain_cell_that_differs_in_nothing_else(make: Make, named: Named, other: str) -> None:
    found = [run(make(other), 0, 5.0), run(make("quant=nf4"), 1, 16.0)]
    told = {row["TPOT ms"]: row["speedup"] for row in rows(titled(build(named("quant"), found).sections, "Cells"))}
    assert told == {"5.00": "1.00", "16.00": ""}


@pytest.mark.parametrize(
    ("changes", "speedup"),
    [
        ({"backend": "autoawq", "versions": {"torch": "2.13.0", "transformers": "4.51.3"}}, "1.25"),
        ({"backend": "autoawq", "versions": {"torch": "2.99", "transformers": "4.51.3"}}, ""),
        ({"versions": {"torch": "2.13.0", "transformers": "4.51.3"}}, ""),
    ],
)
def test_a_backend_with_packages_of_its_own_is_set_against_the_plain_step_of_its_torch(
    make: Make, named: Named, changes: dict[str, Any], speedup: str
) -> None:
    plain, other = run(make(), 0, 20.0), run(make("quant=nf4"), 1, 16.0)
    for one, versions in ((plain, {"torch": "2.13.0", "transformers": "5.17.0"}), (other, changes["versions"])):
        one.record.environment = one.record.environment | {"versions": versions}
    if backend := changes.get("backend"):
        other.record.config["backend"] = other.record.config["backend"] | {"name": backend}
    told = {
        row["TPOT ms"]: row["speedup"]
        for row in rows(titled(build(named("quant"), [plain, other]).sections, "Cells"))
    }
    assert told["16.00"] == speedup


def test_profiles_table(make: Make, named: Named) -> None:
    """A step of 0.05 ms in which the device was busy for 45 us and profiled for 100: twice as long."""
    one = run(make(), 0, 0.05)
    one.record.measured = {"profile": ONE_PROFILE}
    one.record.metrics |= figures(ONE_PROFILE, 0.05) | {"bw_util": 0.25, "bw_util_profiled": 0.125}
    sections = build(named("profile"), [one]).sections
    section = titled(sections, "Where a step")
    [row] = rows(section)
    assert {key: value for key, value in row.items() if key != "model"} == {
        "TPOT ms": "0.050",
        "within": "10.00%",
        "across": "",
        "busy ms": "0.045",
        "memcpy ms": "0.010",
        "launch gap ms": "0.005",
        "host ms": "0.035",
        "kernels": "2",
        "a block": "0",
        "inflation": "2.00",
        "cpu/cuda": "1.65",
        "bw_util": "0.250",
        "profiled": "0.125",
    }
    assert section.text[1:] == [
        "qwen2.5-7b: profiled steps took 2.00 times as long as unprofiled ones: the gap between kernels is the "
        "profiler's; busy time is not"
    ]
    table = rows(titled(sections, "Kernels of"))
    assert [list(row.values()) for row in table] == [
        ["gemv<float>(int)", "1", "0", "20.0", "44.4%"],
        ["gemv<half>(int)", "1", "0", "20.0", "44.4%"],
        ["Memcpy", "1", "0", "10.0", "22.2%"],
        ["Memset", "1", "0", "10.0", "22.2%"],
    ]


def test_copies_are_told_of_an_older_record_too_and_none_is_0(make: Make, named: Named) -> None:
    """Whose metrics do not have them: its profile has."""
    plain = {key: value for key, value in ONE_PROFILE.items() if not key.startswith("memcpy")}
    for profiled, told in ((ONE_PROFILE, "0.010"), (plain, "0.000"), ({"steps": 0}, "")):
        one = run(make(), 0, 0.05)
        one.record.measured = {"profile": profiled}
        [row] = rows(titled(build(named("profile"), [one]).sections, "Where a step"))
        assert row["memcpy ms"] == told


@pytest.mark.parametrize(
    ("traced", "told"),
    [
        (True, "Its trace is kept, beside its record or among its run's artifacts as trace.json.gz."),
        (False, "Its trace was not kept with these records."),
    ],
)
def test_a_profile_s_trace_is_told_of_where_it_is_kept(make: Make, named: Named, traced: bool, told: str) -> None:
    one = run(make(), 0, 0.05)
    one.record.measured = {"profile": ONE_PROFILE}
    found = [dataclasses.replace(one, traced=traced)]
    assert titled(build(named("profile"), found).sections, "Kernels of").text[0].endswith(told)


def test_a_profile_s_kernels_are_counted_a_block_and_told_apart_by_their_full_names(make: Make, named: Named) -> None:
    """Of 28 blocks: 84 launches are 3 a block, 57 are 2 and the final norm's; the head's one is none of a block's."""
    one = run(make(), 0, 0.1)
    add, fill = (f"void at::native::each<8, at::native::{name}<c10::BFloat16> >(int)" for name in ("Add", "Fill"))
    kernels = {add: 57, "void gemv<1>(int)": 84, fill: 28, "head": 1}
    entries = {name: {"count": count, "us": 100 - place} for place, (name, count) in enumerate(kernels.items())}
    one.record.measured = {"profile": ONE_PROFILE | {"kernels": entries, "memcpys": 0, "memsets": 0}}
    section = titled(build(named("profile"), [one]).sections, "Kernels of")
    assert [[row[key] for key in ("kernel", "a step", "a block")] for row in rows(section)] == [
        ["at::native::each<8, Add<BFloat16> >(int)", "57", "2"],
        ["gemv", "84", "3"],
        ["at::native::each<8, Fill<BFloat16> >(int)", "28", "1"],
        ["head", "1", "0"],
    ]
    one.record.config["model"] = one.record.config["model"] | {"layers": 1}
    section = titled(build(named("profile"), [one]).sections, "Kernels of")
    assert [row["a block"] for row in rows(section)] == [""] * 4


def test_a_profile_whose_parts_make_the_step_says_so(make: Make, named: Named) -> None:
    one = run(make(), 0, 0.1)
    one.record.measured = {"profile": ONE_PROFILE}
    section = titled(build(named("profile"), [one]).sections, "Where a step")
    assert section.text[1:] == ["qwen2.5-7b: the profile's parts make the unprofiled step within 5 %"]


def test_pairs_table(make: Make, named: Named) -> None:
    """Ratios 1.2, 1.2 and 1.5: mean 1.3, Student's half width 4.3027 * sqrt(.01) = .4303, and of 27 resampled means
    8 are the least and one the greatest, both over 2.5 %."""
    [row] = rows(
        titled(build(named("graphs_ab"), arms(make, (12.0, 12.0, 15.0), (10.0,) * 3)).sections, "eager against")
    )
    assert (row["eager ms"], row["cuda_graph ms"], row["difference ms"]) == ("13.000", "10.000", "3.000")
    assert (row["speedup"], row["across"]) == ("1.3000", "13.32%")
    assert (row["t 95 %"], row["bootstrap 95 %"]) == ("[0.8697, 1.7303]", "[1.2000, 1.5000]")


def test_a_picture_of_pairs_has_each_session_and_the_thresholds_of_its_own_block(make: Make, named: Named) -> None:
    """The study's rule is of ctx 2048 on a GPU above 2 TB/s: at 8192 there is nothing to be killed by."""
    found = [*arms(make, (12.0, 15.0), (10.0, 10.0))[2:], *arms(make, (12.0, 15.0), (10.0, 10.0), "context=8192")]
    section = titled(build(named("graphs_ab"), found).sections, "eager against")
    short, long = section.figures() if section.figures else []
    assert [list(trace.y) for trace in short.data] == [[15.0, 10.0], [1.5]]
    assert [list(trace.hovertext) for trace in short.data] == [
        ["session 1, run run02", "session 1, run run03"],
        ["run run02 over run run03"],
    ]
    assert list(short.layout.xaxis2.ticktext) == ["1"]
    assert [list(trace.y) for trace in long.data] == [[12.0, 10.0], [15.0, 10.0], [1.2, 1.5]]
    assert [(line.y0, line.line.color) for line in short.layout.shapes] == [(1.5, "#3465a4"), (1.15, "#cc0000")]
    assert [note.text for note in short.layout.annotations][2:] == ["killed below 1.15"]
    assert 1.15 not in [line.y0 for line in long.layout.shapes]


def test_the_steps_of_each_run_have_their_quantiles(make: Make, named: Named) -> None:
    one, lost = (
        run(make(), 0, 30.0),
        run(make(), 1, 1.0, session=1, outcome=Outcome.OOM, metrics={}, step_times_ms=[]),
    )
    one.record.step_times_ms = [float(time) for time in range(20, 41)]
    told = rows(titled(build(named("matrix"), [one, lost]).sections, "Step times"))
    assert [[*row.values()][1:] for row in told] == [["0", "21", "20.000", "22.000", "30.000", "38.000", "40.000"]]


def test_each_run_has_a_strip_of_its_own(make: Make, named: Named) -> None:
    """Beside the other session's of its cell, and apart from the next cell's."""
    found = [*arms(make, (14.0, 15.0), (11.0, 12.0)), call(make(*KERNEL), 9, 40.0, 1.12)]
    sections = build(named("attention"), found).sections
    step, alone = titled(sections, "Step times"), titled(sections, "Call times")
    [figure] = step.figures() if step.figures else []
    assert [(strip.y0, sorted(strip.x)[1], strip.hovertext) for strip in figure.data] == [
        (0, 14.0, "session 0, run run00"),
        (1, 15.0, "session 1, run run02"),
        (3, 11.0, "session 0, run run01"),
        (4, 12.0, "session 1, run run03"),
    ]
    assert len({strip.marker.color for strip in figure.data[:2]}) == 2
    assert dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True)) == {
        0.5: "eager",
        3.5: "cuda_graph",
    }
    [figure] = alone.figures() if alone.figures else []
    assert [[*strip.x] for strip in figure.data] == [[36.0, 40.0, 44.0]]
    assert [row["p50"] for row in rows(alone)] == ["40.000"]
    assert "Microseconds" in alone.text[0]


def test_one_gpu_is_no_ladder_and_gets_no_picture(make: Make, named: Named) -> None:
    def drawn(found: Sequence[Observation]) -> list[list[float]]:
        section = titled(build(named("cost"), found, prices={"h100": 36.0, "l4": 3.6}).sections, "$/Mtok")
        return [list(figure.data[0].x) for figure in (section.figures() if section.figures else [])]

    alone = run(make(), 0, 10.0)
    assert drawn([alone]) == []
    assert drawn([alone, run(make(gpu="l4"), 1, 50.0)]) == [pytest.approx([50.0, 100.0])]


def test_a_median_is_no_mean(make: Make) -> None:
    [one] = cells([run(make(), place, tpot, session=place) for place, tpot in enumerate((1.0, 2.0, 9.0))])
    assert (one.median("median_tpot_ms"), one.mean("median_tpot_ms")) == (2.0, 4.0)

"""Where a profiled step's time went, out of intervals whose answers are known by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.profile import (
    Interval,
    Row,
    Step,
    doubts,
    figures,
    kernels_per_block,
    rows,
    self_us,
    steps,
    summary,
    union_us,
)

ONE_STEP = [
    Interval("rfloor.step", 1000, 1100, "step"),
    Interval("aten::mm", 1005, 1024, "operator"),
    Interval("cudaLaunchKernel", 1010, 1012, "call", correlation=1),
    Interval("cudaLaunchKernel", 1020, 1022, "call", correlation=2),
    Interval("cudaMemcpyAsync", 1030, 1033, "call", correlation=3),
    Interval("cudaMemsetAsync", 1034, 1035, "call", correlation=4),
    Interval("cudaStreamIsCapturing", 1036, 1037, "call", correlation=5),
    Interval("cudaDeviceSynchronize", 1040, 1098, "call", correlation=6),
    Interval("void gemv<float>(int)", 1015, 1035, "kernel", correlation=1),
    Interval("void gemv<half>(int)", 1025, 1045, "kernel", correlation=2),
    Interval("Memcpy HtoD (Pageable -> Device)", 1060, 1070, "memcpy", correlation=3, nbytes=64),
    Interval("Memset (Device)", 1065, 1075, "memset", correlation=4, nbytes=128),
]
"""Two kernels on two streams that overlap by 10, a gap of 15, then a copy and a fill that overlap by 5."""

ONE_PROFILE = {
    "steps": 1,
    "wall_us": 100,
    "inflation": 2.0,
    "kernels_per_step": 2,
    "kernels_per_block": 0,
    "kernel_us": 40,
    "memcpys": 1,
    "memcpy_us": 10,
    "memcpy_bytes": 64,
    "memsets": 1,
    "memset_us": 10,
    "memset_bytes": 128,
    "busy_us": 45,
    "span_us": 60,
    "gap_us": 15,
    "head_us": 15,
    "tail_us": 25,
    "host_us": 35,
    "runtime_us": 67,
    "launch_us": 8,
    "sync_us": 58,
    "cpu_cuda_ratio": 1.65,
    "kernels": {f"void gemv<{kind}>(int)": {"count": 1, "us": 20} for kind in ("float", "half")},
    "calls": {
        "cudaDeviceSynchronize": {"count": 1, "us": 58},
        "cudaLaunchKernel": {"count": 2, "us": 4},
        "cudaMemcpyAsync": {"count": 1, "us": 3},
        "cudaMemsetAsync": {"count": 1, "us": 1},
        "cudaStreamIsCapturing": {"count": 1, "us": 1},
    },
}


def profile(intervals: Sequence[Interval], layers: int = 28, device: str = "cuda", ms: float = 0.05) -> Any:
    return summary(steps(intervals), layers, device, ms)


def later(intervals: Sequence[Interval], us: float, correlation: int = 0) -> list[Interval]:
    """The same at another time, under other correlations."""
    return [
        Interval(
            i.name,
            i.start_us + us,
            i.end_us + us,
            i.kind,
            i.correlation + correlation if i.correlation else 0,
            i.nbytes,
            i.thread,
        )
        for i in intervals
    ]


@pytest.mark.parametrize(
    ("copied", "count", "us", "nbytes"), [(1, 0, 0, 0), (2, 0, 0, 0), (3, 1, 10, 64), (5, 1, 10, 64)]
)
def test_a_copy_that_few_steps_have_is_none_of_the_median_step_s(
    copied: int, count: int, us: float, nbytes: int
) -> None:
    """A step without a copy has none, which is 0: of five steps the median has one where three have."""
    bare = [i for i in ONE_STEP if i.kind not in ("memcpy", "memset") and i.correlation not in (3, 4)]
    one = [Interval("Memcpy HtoD (Pageable -> Device)", 1060, 1070, "memcpy", correlation=3, nbytes=64)]
    one.append(Interval("cudaMemcpyAsync", 1030, 1033, "call", correlation=3))
    five = [i for n in range(5) for i in later([*bare, *(one if n < copied else [])], 200 * n, 10 * n)]
    told = profile(five)
    assert (told["memcpys"], told["memcpy_us"], told["memcpy_bytes"]) == (count, us, nbytes)
    assert ("Memcpy" in {row.name for row in rows(told)}) == (count > 0)
    assert ("cudaMemcpyAsync" in told["calls"]) == (count > 0)
    assert not any("memset" in name for name in told)


def kernels(*times: tuple[float, float]) -> list[Interval]:
    return [Interval("k", start, end, "kernel") for start, end in times]


def test_every_quantity_of_one_step_by_hand() -> None:
    assert profile(ONE_STEP) == ONE_PROFILE


def test_the_parts_make_the_whole() -> None:
    told = profile(ONE_STEP)
    assert told["head_us"] + told["busy_us"] + told["gap_us"] + told["tail_us"] == told["wall_us"]


def test_the_dearest_comes_first() -> None:
    assert [*profile(ONE_STEP)["calls"]][:2] == ["cudaDeviceSynchronize", "cudaLaunchKernel"]


def test_quantities_are_medians_over_the_steps() -> None:
    slow = [Interval("rfloor.step", 5000, 5900, "step"), *later(ONE_STEP[1:], 4000, 100)]
    told = profile([*ONE_STEP, *later(ONE_STEP, 200, 10), *slow, *later(ONE_STEP, 8000, 200)])
    assert told == ONE_PROFILE | {"steps": 4}


def test_a_kernel_that_few_steps_have_is_no_part_of_a_step() -> None:
    plan = Interval("planned_once", 1050, 1055, "kernel", correlation=1)
    told = profile([*ONE_STEP, plan, *later(ONE_STEP, 200, 10), *later(ONE_STEP, 400, 20)])
    assert told["kernels"] == ONE_PROFILE["kernels"]
    assert told["kernels_per_step"] == 2


def test_a_count_is_a_count_where_two_steps_differ() -> None:
    one_more = Interval("gemv", 1280, 1290, "kernel", correlation=11)
    told = profile([*ONE_STEP, *later(ONE_STEP, 200, 10), one_more])
    assert told["kernels_per_step"] == 2
    assert type(told["kernels_per_step"]) is int


# Busy time


@pytest.mark.parametrize(
    ("times", "busy"),
    [
        ([], 0),
        ([(3, 3)], 0),
        ([(0, 10)], 10),
        ([(0, 10), (20, 25)], 15),
        ([(20, 25), (0, 10)], 15),
        ([(0, 10), (5, 15)], 15),
        ([(0, 10), (10, 15)], 15),
        ([(0, 10), (2, 5), (4, 6)], 10),
        ([(0, 10), (0, 10)], 10),
        ([(-20, -10), (-15, 0)], 20),
    ],
)
def test_overlapping_work_keeps_a_device_busy_once(times: list[tuple[float, float]], busy: float) -> None:
    assert union_us(kernels(*times)) == busy


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_busy_time_is_what_counting_microseconds_gives(times: list[tuple[int, int]]) -> None:
    found = kernels(*((start, start + length) for start, length in times))
    assert union_us(found) == len({us for start, length in times for us in range(start, start + length)})


# Which step


def test_work_belongs_to_the_step_that_launched_it() -> None:
    late = Interval("late", 1150, 1160, "kernel", correlation=1)
    one, other = steps([*later(ONE_STEP, 100, 10), *ONE_STEP, late])
    assert one.whole.start_us == 1000
    assert late in one.device
    assert len(other.device) == 4


def test_what_was_launched_between_steps_belongs_to_none() -> None:
    before = [
        Interval("cudaMemcpyAsync", 990, 995, "call", correlation=77),
        Interval("Memcpy DtoD", 1001, 1002, "memcpy", correlation=77),
        Interval("aten::clone", 985, 996, "operator"),
        Interval("after", 1101, 1102, "operator"),
    ]
    assert steps([*before, *ONE_STEP]) == steps(ONE_STEP)


def test_work_whose_launch_was_not_seen_belongs_to_the_step_of_its_time() -> None:
    blind = [interval for interval in ONE_STEP if interval.kind != "call"]
    told = profile([*blind, *kernels((1200, 1300))])
    unknown = {"host_us", "runtime_us", "launch_us", "sync_us", "cpu_cuda_ratio"}
    assert told == {key: value for key, value in ONE_PROFILE.items() if key not in unknown} | {"calls": {}}


def test_one_graph_launch_launches_every_kernel() -> None:
    graph = [
        Interval("rfloor.step", 0, 100, "step"),
        Interval("cudaGraphLaunch", 2, 12, "call", correlation=9),
        Interval("cudaDeviceSynchronize", 13, 99, "call", correlation=10),
        *(Interval("gemv", 20 + 10 * n, 28 + 10 * n, "kernel", correlation=9) for n in range(7)),
    ]
    told = profile(graph, layers=7)
    assert (told["kernels_per_step"], told["kernels_per_block"]) == (7, 1)
    assert (told["host_us"], told["launch_us"], told["sync_us"]) == (12, 10, 86)
    assert (told["busy_us"], told["span_us"], told["gap_us"]) == (56, 68, 12)
    assert told["cpu_cuda_ratio"] == round(96 / 56, 3)


def test_a_step_with_a_record_of_another_clock_is_not_counted() -> None:
    wrong = [i for i in later(ONE_STEP, 200, 10) if i.correlation != 11 or i.kind != "kernel"]
    lost = Interval("void gemv<float>(int)", -1e11, 20 - 1e11, "kernel", correlation=11)
    assert profile([*ONE_STEP, *wrong, lost]) == ONE_PROFILE | {"steps": 2}


# Blocks


STUDY = ["gemv"] * (28 * 7 + 1) + ["norm"] * (28 * 2 + 1) + ["attend"] * 28 + ["embed"]
"""Ten kernels a block and three outside of them: the study's 283 on Qwen2.5-7B."""


@pytest.mark.parametrize(
    ("names", "layers", "blocks"),
    [
        (STUDY, 28, 10),
        ([], 28, 0),
        (["fused"] * 27 + ["first"], 28, 1),
        (["few"] * 14, 28, 0),
        (["more"] * 15, 28, 1),
        (["a<1>"] * 4 + ["a<2>"] * 2, 4, 1),
        (["a"] * 3, 2, 1),
        (["a"] * 3, 1, None),
    ],
)
def test_kernels_that_repeat_with_the_blocks(names: list[str], layers: int, blocks: int | None) -> None:
    assert kernels_per_block(names, layers) == blocks


def test_the_study_s_step() -> None:
    assert len(STUDY) == 283


def test_a_model_of_one_block_has_no_kernels_per_block() -> None:
    assert "kernels_per_block" not in profile(ONE_STEP, layers=1)


# Operators


OPERATORS = [
    Interval("aten::linear", 10, 60, "operator", thread=1),
    Interval("aten::t", 12, 15, "operator", thread=1),
    Interval("aten::mm", 20, 50, "operator", thread=1),
    Interval("aten::empty", 20, 22, "operator", thread=1),
    Interval("aten::exp", 60, 70, "operator", thread=1),
    Interval("aten::exp", 65, 68, "operator", thread=2),
]


def test_an_operator_s_own_time_is_without_what_it_calls() -> None:
    assert self_us(reversed(OPERATORS)) == [
        ("aten::linear", 17),
        ("aten::t", 3),
        ("aten::mm", 28),
        ("aten::empty", 2),
        ("aten::exp", 10),
        ("aten::exp", 3),
    ]


def test_on_the_cpu_operators_take_the_kernels_place() -> None:
    told = profile([Interval("rfloor.step", 0, 100, "step"), *OPERATORS], device="cpu", ms=0.08)
    assert told == {
        "steps": 1,
        "wall_us": 100,
        "inflation": 1.25,
        "operator_us": 60,
        "operators": {
            "aten::mm": {"count": 1, "us": 28},
            "aten::linear": {"count": 1, "us": 17},
            "aten::exp": {"count": 2, "us": 13},
            "aten::t": {"count": 1, "us": 3},
            "aten::empty": {"count": 1, "us": 2},
        },
    }
    assert figures(told, 0.08) == {"profiled_step_ms": 0.1, "profiler_inflation": 1.25}
    assert rows(told)[:2] == [Row("aten::mm", 1, 28, 28 / 60), Row("aten::linear", 1, 17, 17 / 60)]


# Nothing to see


def test_where_no_step_was_seen_there_is_no_profile() -> None:
    told = profile([], device="cuda")
    assert told == {"steps": 0} == profile(ONE_STEP[1:], device="cpu")
    assert figures(told, 2.0) == {}
    assert rows(told) == []
    assert doubts(told, 2.0) == ["torch.profiler saw no step here: there is no profile"]


@pytest.mark.parametrize("seen", [ONE_STEP[:1], ONE_STEP[:2], ONE_STEP[:8]])
def test_where_nothing_ran_on_the_device_the_step_s_time_is_left(seen: list[Interval]) -> None:
    told = profile(seen)
    assert told == {"steps": 1, "wall_us": 100, "inflation": 2.0}
    assert figures(told, 0.05) == {"profiled_step_ms": 0.1, "profiler_inflation": 2.0}
    assert rows(told) == []
    [doubt] = doubts(told, 0.05)
    assert doubt.startswith("torch.profiler saw nothing run on the device")


def test_copies_alone_have_no_ratio_to_kernels() -> None:
    told = profile([i for i in ONE_STEP if i.kind != "kernel"])
    assert told["kernels_per_step"] == 0
    assert told["busy_us"] == 15
    assert "cpu_cuda_ratio" not in told
    assert told["kernels"] == {}


# The split of an unprofiled step


def test_the_split_is_set_against_the_unprofiled_step() -> None:
    assert figures(ONE_PROFILE, 0.05) == pytest.approx(
        {
            "gpu_busy_ms": 0.045,
            "memcpy_ms": 0.01,
            "launch_gap_ms": 0.005,
            "host_ms": 0.035,
            "profiled_step_ms": 0.1,
            "profiler_inflation": 2.0,
            "kernels_per_step": 2,
            "kernels_per_block": 0,
            "cpu_cuda_ratio": 1.65,
        }
    )


def test_a_step_without_copies_copied_for_0_ms() -> None:
    told = profile([i for i in ONE_STEP if i.kind != "memcpy"])
    assert "memcpy_us" not in told
    assert figures(told, 0.05)["memcpy_ms"] == 0


def test_a_gap_below_0_is_kept() -> None:
    assert figures(ONE_PROFILE, 0.04)["launch_gap_ms"] == pytest.approx(-0.005)


@pytest.mark.parametrize("step_ms", [0.1, 0.0953, 0.1052])
def test_parts_that_make_the_unprofiled_step_raise_no_doubt(step_ms: float) -> None:
    assert doubts(ONE_PROFILE, step_ms) == []


@pytest.mark.parametrize(
    ("step_ms", "told"),
    [
        (
            0.0476,
            "profiled steps took 2.10 times as long as unprofiled ones: the gap between kernels is the profiler's; "
            "busy time is not",
        ),
        (0.0952, "profiled steps took 1.05 times as long as unprofiled ones"),
        (
            0.125,
            "profiled steps took 0.80 times as long as unprofiled ones: what the timed steps alone waited for is in "
            "no part of the profile",
        ),
        (
            0.04,
            "the device was busy for 0.045 ms of a profiled step, and an unprofiled one takes 0.040 ms: under the "
            "profiler the kernels themselves took longer",
        ),
    ],
)
def test_parts_that_do_not_say_why(step_ms: float, told: str) -> None:
    [doubt] = doubts(ONE_PROFILE, step_ms)
    assert doubt.startswith(told)


@pytest.mark.parametrize(("wall_us", "told"), [(105, []), (150, ["1.50 times"])])
def test_on_the_cpu_the_profiler_s_time_is_in_the_operators(wall_us: float, told: list[str]) -> None:
    found = doubts({"steps": 1, "wall_us": wall_us, "operators": {}}, 0.1)
    assert ["operators' times hold the profiler's own" in doubt for doubt in found] == [True] * len(told)
    assert all(words in doubt for words, doubt in zip(told, found, strict=True))


# The table


def test_a_table_has_kernels_and_copies() -> None:
    assert rows(ONE_PROFILE) == [
        Row("void gemv<float>(int)", 1, 20, 20 / 45),
        Row("void gemv<half>(int)", 1, 20, 20 / 45),
        Row("Memcpy", 1, 10, 10 / 45),
        Row("Memset", 1, 10, 10 / 45),
    ]


def test_a_step_without_work_of_its_own_time_is_not_timed() -> None:
    whole = Interval("rfloor.step", 0, 10, "step")
    assert not Step(whole, (), ()).timed
    assert Step(whole, (), tuple(kernels((10, 12)))).timed
    assert not Step(whole, (), tuple(kernels((1, 2), (11, 12)))).timed

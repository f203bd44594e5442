"""Summaries of step times, and when they are called unsteady."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import stats

MILLISECONDS = st.floats(1e-3, 1e5)


@pytest.mark.parametrize(
    ("times", "median", "mean", "p90", "p99", "std"),
    [
        (list(range(1, 101)), 50.5, 50.5, 90.1, 99.01, math.sqrt(2525 / 3)),
        ([4.0, 1.0, 3.0, 2.0], 2.5, 2.5, 3.7, 3.97, math.sqrt(5 / 3)),
        ([10.0, 20.0, 90.0], 20.0, 40.0, 76.0, 88.6, math.sqrt(1900)),
        ([7.5], 7.5, 7.5, 7.5, 7.5, 0.0),
    ],
)
def test_summary_of_known_times(
    times: list[float], median: float, mean: float, p90: float, p99: float, std: float
) -> None:
    assert stats.summary(times) == pytest.approx(
        {
            "median_tpot_ms": median,
            "mean_tpot_ms": mean,
            "p90_tpot_ms": p90,
            "p99_tpot_ms": p99,
            "std_tpot_ms": std,
        }
    )


@given(times=st.lists(MILLISECONDS, min_size=2, max_size=40))
def test_summary_agrees_with_numpy_and_the_standard_library(times: list[float]) -> None:
    found = stats.summary(times)
    assert found["median_tpot_ms"] == pytest.approx(statistics.median(times))
    assert found["mean_tpot_ms"] == pytest.approx(statistics.fmean(times))
    assert found["std_tpot_ms"] == pytest.approx(statistics.stdev(times), rel=1e-6, abs=1e-9)
    for percent in (90, 99):
        assert found[f"p{percent}_tpot_ms"] == pytest.approx(np.percentile(times, percent, method="linear"))
    assert all(type(value) is float for value in found.values()), "JSON takes no NumPy number"


def told(times: list[float]) -> list[str]:
    """Which of the three rules speak."""
    words = {"standard deviation": "std", "slowest": "slowest", "fastest": "fastest"}
    return [short for line in stats.unsteady(times) for word, short in words.items() if word in line]


@pytest.mark.parametrize(
    ("times", "rules"),
    [
        ([10.0] * 30, []),
        ([9.001, 10.0, 10.999], []),
        ([9.0, 10.0, 11.0], ["std"]),  # 1 of 10: exactly 10 %
        ([8.999, 10.0, 11.001], ["std"]),
        ([*[10.0] * 98, 14.99, 5.01], []),
        ([*[10.0] * 98, 15.0, 5.0], ["slowest", "fastest"]),  # 5 of 10: exactly 50 %, the deviation is 7 %
        ([*[10.0] * 48, 15.0, 7.5, 7.5], ["slowest"]),
        ([*[10.0] * 48, 12.5, 12.5, 5.0], ["fastest"]),
        ([5.0, 10.0, 15.0], ["std", "slowest", "fastest"]),
        ([1.0, 1.0, 4.0], ["std", "slowest", "fastest"]),
        ([10.0], []),
        ([0.0, 0.0], []),
        ([-1.0, 1.0], []),
    ],
)
def test_unsteady_by_pyperf_s_thresholds(times: list[float], rules: list[str]) -> None:
    assert told(times) == rules


@given(times=st.lists(MILLISECONDS, min_size=2, max_size=40), scale=st.sampled_from([0.25, 4.0, 1024.0]))
def test_unsteadiness_knows_no_unit(times: list[float], scale: float) -> None:
    assert stats.unsteady([t * scale for t in times]) == stats.unsteady(times)


def test_what_is_told_holds_the_figures() -> None:
    assert stats.unsteady([5.0, 10.0, 15.0]) == [
        "unsteady: the standard deviation is 50% of the mean step time",
        "unsteady: the slowest step lies 50% off the mean",
        "unsteady: the fastest step lies 50% off the mean",
    ]

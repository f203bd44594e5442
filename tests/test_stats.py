"""Summaries of step times, and when they are called unsteady."""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import stats
from registry.sessions import order

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


# Two arms over sessions


def test_a_comparison_of_known_medians() -> None:
    """The study's Table 2 has no rows left; these are made so that every figure is known by hand."""
    found = stats.compare([12.0, 12.0, 15.0], [10.0, 10.0, 10.0], seed=0)
    assert found.ratios == pytest.approx((1.2, 1.2, 1.5))
    assert found.mean == pytest.approx(1.3)
    # sd = sqrt(.03), t(.975, 2) = 4.30265
    half = 4.302653 * math.sqrt(0.03 / 3)
    assert found.student is not None
    assert (found.student.low, found.student.high) == pytest.approx((1.3 - half, 1.3 + half))
    assert found.cv == pytest.approx(math.sqrt(0.03) / 1.3)
    assert found.bootstrap is not None
    # Of 27 equally likely resamples of three, 8 have the mean 1.2 and one has 1.5: both are over 2.5 %.
    assert (found.bootstrap.low, found.bootstrap.high) == pytest.approx((1.2, 1.5))


def test_one_session_has_no_interval() -> None:
    found = stats.compare([12.0], [10.0], seed=0)
    assert (found.mean, found.student, found.bootstrap, found.cv) == (1.2, None, None, None)


def test_sessions_that_do_not_differ_tell_nothing_of_others() -> None:
    found = stats.compare([12.0] * 3, [10.0] * 3, seed=0)
    assert found.student is None
    assert found.bootstrap == stats.Interval(1.2, 1.2)


def test_arms_of_unequal_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        stats.compare([1.0, 2.0], [1.0], seed=0)


def test_spread_within_and_across_sessions() -> None:
    found = stats.spread([[9.0, 10.0, 11.0], [19.0, 20.0, 21.0]])
    assert found.within == pytest.approx(math.sqrt((0.1**2 + 0.05**2) / 2))
    assert found.across == pytest.approx(math.sqrt(50) / 15)
    assert stats.spread([[9.0, 10.0, 11.0]]).across is None


N10 = 10
TRIALS = 1500
"""In each of them ten thousand resamples are drawn: more would take longer than ten seconds."""
BOOTSTRAP_HOLDS = 0.904


def give_or_take(share: float) -> float:
    """Three standard errors of a share of the trials."""
    return 3 * math.sqrt(share * (1 - share) / TRIALS)


def held(interval: Callable[[Sequence[float]], stats.Interval | None], seed: int) -> list[bool]:
    """In which trials a 95 % interval of ten normal values holds their true mean."""
    found = [interval(values) for values in np.random.default_rng(seed).normal(1.25, 0.012, (TRIALS, N10))]
    return [one is not None and one.low <= 1.25 <= one.high for one in found]


def test_coverage_at_ten_sessions() -> None:
    """Student's interval covers 95 % of normal means; the percentile bootstrap is narrower by sqrt(9/10) and by the
    normal's 1.96 in place of t's 2.26: it covers what 1.96 sqrt(.9) = 1.859 does under t with 9 degrees, 90.4 %."""
    student = held(stats.student, seed=11)
    bootstrap = held(lambda values: stats.percentile_bootstrap(values, seed=0), seed=11)
    assert statistics.fmean(student) == pytest.approx(0.95, abs=give_or_take(0.95))
    assert statistics.fmean(bootstrap) == pytest.approx(BOOTSTRAP_HOLDS, abs=give_or_take(BOOTSTRAP_HOLDS))
    assert BOOTSTRAP_HOLDS + give_or_take(BOOTSTRAP_HOLDS) < 0.95 - give_or_take(0.95), "neither passes for the other"
    wider = statistics.fmean(one and not other for one, other in zip(student, bootstrap, strict=True))
    assert wider == pytest.approx(0.95 - BOOTSTRAP_HOLDS, abs=give_or_take(0.95 - BOOTSTRAP_HOLDS))


def test_the_bootstrap_is_the_percentile_interval() -> None:
    values = np.random.default_rng(3).normal(1.25, 0.012, N10)
    found = stats.percentile_bootstrap(values, seed=0)
    resamples = np.random.default_rng(4).choice(values, (20_000, N10)).mean(axis=1)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(resamples, [2.5, 97.5])), abs=5e-4)
    assert found == stats.percentile_bootstrap(values, seed=0)


def test_two_equal_arms_seldom_differ() -> None:
    """A/A, in the order in which a call measures them: a claim that one arm is faster is decided, one way or the
    other, in 5 % of all experiments, though the machine takes 8 % longer at the end of a call than at its beginning.

    Drift within a session favours whoever leads. Where one arm always led, it would be 0.4 % of a ratio whose mean
    has a standard error of 0.4 %, and 13 % of all experiments would be decided. The percentile interval, which is
    told beside it, leaves 1 out in 9.6 %.
    """
    dice = np.random.default_rng(5)
    decided = missed = 0
    for seed in range(TRIALS):
        arms: tuple[list[float], list[float]] = ([0.0] * N10, [0.0] * N10)
        for place, (session, arm) in enumerate(order([0, 0], N10, seed)):
            arms[arm][session] = float(dice.normal(14.8, 0.13)) * (1 + 0.004 * place)
        found = stats.compare(*arms, seed=seed)
        decided += stats.judge(found.student, "below", 1.0) is not stats.Verdict.INCONCLUSIVE
        assert found.bootstrap is not None
        missed += not found.bootstrap.low <= 1 <= found.bootstrap.high
    assert decided / TRIALS == pytest.approx(0.05, abs=give_or_take(0.05))
    assert missed / TRIALS == pytest.approx(1 - BOOTSTRAP_HOLDS, abs=give_or_take(BOOTSTRAP_HOLDS))


@pytest.mark.parametrize(
    ("ratios", "killed_if", "verdict"),
    [
        ([1.25, 1.26, 1.27], "below", "survives"),  # the study's H100 rule
        ([1.02, 1.03, 1.04], "below", "killed"),
        ([1.10, 1.15, 1.20], "below", "inconclusive"),
        ([1.02, 1.03, 1.04], "above", "survives"),  # the study's L4 rule
        ([1.25, 1.26, 1.27], "above", "killed"),
        ([1.10, 1.15, 1.20], "above", "inconclusive"),
        ([1.15, 1.15, 1.15], "below", "inconclusive"),  # a tie
        ([1.15, 1.15, 1.15], "above", "inconclusive"),
        ([1.25, 1.25], "below", "inconclusive"),  # as good as one
        ([1.15] * 19 + [math.nextafter(1.15, 2)], "below", "inconclusive"),
        ([1.25, 1.26, math.nan], "below", "inconclusive"),
        ([1.02, 1.03, math.nan], "below", "inconclusive"),
        ([9.0], "below", "inconclusive"),  # one session decides nothing
        ([0.1], "below", "inconclusive"),
    ],
)
def test_verdicts(ratios: list[float], killed_if: str, verdict: str) -> None:
    assert stats.judge(stats.student(ratios), killed_if, 1.15) == verdict

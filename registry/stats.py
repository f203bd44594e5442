"""Summaries of step times, when to distrust them, and what two arms' sessions say of a claim."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

UNSTEADY_STD = 0.10
UNSTEADY_EXTREME = 0.50
"""pyperf calls a benchmark unstable when the standard deviation reaches 10 % of the mean, or the minimum or
maximum lies 50 % or more off the mean (`pyperf/_cli.py`, `format_checks`). rfloor uses its thresholds."""


def summary(times_ms: Sequence[float]) -> dict[str, float]:
    """Median, mean, 90th and 99th percentile and standard deviation of step times.

    Percentiles interpolate linearly; the standard deviation is the sample's (n - 1), 0 for one step.

    Args:
        times_ms: Milliseconds, at least one.
    """
    times = np.asarray(times_ms, dtype=float)
    return {
        "median_tpot_ms": float(np.median(times)),
        "mean_tpot_ms": float(times.mean()),
        "p90_tpot_ms": float(np.percentile(times, 90)),
        "p99_tpot_ms": float(np.percentile(times, 99)),
        "std_tpot_ms": float(times.std(ddof=1)) if times.size > 1 else 0.0,
    }


def unsteady(times_ms: Sequence[float]) -> list[str]:
    """What makes these step times unsteady by pyperf's thresholds; empty if nothing does."""
    times = np.asarray(times_ms, dtype=float)
    mean = float(times.mean())
    if times.size < 2 or mean <= 0:
        return []
    found = []
    spread = float(times.std(ddof=1)) / mean
    if spread >= UNSTEADY_STD:
        found.append(f"unsteady: the standard deviation is {spread:.0%} of the mean step time")
    for name, extreme in (("slowest", float(times.max())), ("fastest", float(times.min()))):
        off = abs(extreme - mean) / mean
        if off >= UNSTEADY_EXTREME:
            found.append(f"unsteady: the {name} step lies {off:.0%} off the mean")
    return found


RESAMPLES = 10_000
CONFIDENCE = 0.95
ROUNDING = 1e-9
"""Standard error over mean below which values are equal but for the arithmetic."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends in it."""

    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """How figures differ within a session and from session to session, as coefficients of variation.

    Attributes:
        within: Root mean square over the sessions of each one's standard deviation over its mean.
        across: Standard deviation of the sessions' medians over their mean; `None` for one session.
    """

    within: float
    across: float | None


@dataclass(frozen=True)
class Comparison:
    """Two arms over sessions, paired: what the study's Table 2 states.

    Attributes:
        ratios: Of each session, baseline median / candidate median: above 1 the candidate is faster.
        mean: Of the ratios.
        bootstrap: Percentile interval of the mean ratio over `RESAMPLES` resamples, the study's; at ten sessions it
            covers about 90 %.
        student: Student's t interval of the mean ratio, which verdicts rest on; `None` for one session, and for
            sessions that do not differ.
        cv: The ratios' coefficient of variation across sessions; `None` for one session.
    """

    ratios: tuple[float, ...]
    mean: float
    bootstrap: Interval | None
    student: Interval | None
    cv: float | None


class Verdict(StrEnum):
    """What an interval says of a claim that was registered with a threshold."""

    SURVIVES = "survives"
    KILLED = "killed"
    INCONCLUSIVE = "inconclusive"


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation, the sample's standard deviation over the mean; `None` for one value."""
    if len(values) < 2:
        return None
    found = np.asarray(values, dtype=float)
    return float(found.std(ddof=1) / found.mean())


def spread(sessions: Sequence[Sequence[float]]) -> Spread:
    """Within-session and cross-session spread of step times.

    Args:
        sessions: Each session's step times, milliseconds.
    """
    within = [variation(times) or 0.0 for times in sessions]
    medians = [float(np.median(times)) for times in sessions]
    return Spread(float(np.sqrt(np.mean(np.square(within)))), variation(medians))


def student(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean; `None` for one value, and for values that do not differ.

    Step times are measured in nanoseconds: ratios that agree to rounding are no sample of anything.
    """
    if len(values) < 2:
        return None
    from scipy.stats import sem, t

    found = np.asarray(values, dtype=float)
    mean, error = float(found.mean()), float(sem(found))
    if not error > abs(mean) * ROUNDING:
        return None
    low, high = t.interval(CONFIDENCE, found.size - 1, loc=mean, scale=error)
    return Interval(float(low), float(high))


def percentile_bootstrap(values: Sequence[float], seed: int) -> Interval | None:
    """Percentile interval of the mean over `RESAMPLES` resamples; `None` for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def compare(baseline: Sequence[float], candidate: Sequence[float], seed: int) -> Comparison:
    """Set two arms against each other, session by session.

    Args:
        baseline: Median step time of each session, milliseconds.
        candidate: The same sessions' medians of the other arm.
        seed: Of the resampling.
    """
    ratios = tuple(one / other for one, other in zip(baseline, candidate, strict=True))
    return Comparison(
        ratios,
        float(np.mean(ratios)),
        percentile_bootstrap(ratios, seed),
        student(ratios),
        variation(ratios),
    )


def judge(interval: Interval | None, killed_if: str, threshold: float) -> Verdict:
    """The verdict on a claim that is dead where the true mean lies on one side of a threshold.

    Args:
        interval: Of the mean; `None` decides nothing.
        killed_if: `below` or `above` the threshold.
        threshold: In the interval's unit.

    Returns:
        `killed` or `survives` where the whole interval lies on one side, else `inconclusive`.
    """
    if interval is None or not (interval.high < threshold or interval.low > threshold):
        return Verdict.INCONCLUSIVE
    below = interval.high < threshold
    return Verdict.KILLED if below == (killed_if == "below") else Verdict.SURVIVES

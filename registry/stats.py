"""Summaries of step times, and when to distrust them."""

from __future__ import annotations

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

"""What a record has to hold before a table, a report or a file of the study's is made of it.

A record can be kept and imported whatever stands in its configuration and its measurement: those are the worker's and
a plugin's. What is told of it reads some of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome
from registry.record import BadRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from registry.record import Record

Types = type | tuple[type, ...]

NUMBER = (int, float)
NAMED: dict[str, Types] = {"name": str}
CONFIG: dict[str, dict[str, Types]] = {
    "model": NAMED,
    "gpu": NAMED | {name: (*NUMBER, type(None)) for name in ("peak_bandwidth_gbs", "price_usd_per_hour")},
    "backend": NAMED,
    "quant": NAMED,
    "attention": NAMED,
    "execution": NAMED | {"cache": str},
    "protocol": {"context": int, "batch_size": int, "seed": int},
}
PROFILE: dict[str, Types] = {
    **{f"{part}_us": NUMBER for part in ("wall", "head", "busy", "gap", "tail", "launch", "sync")},
    **{f"{kind}{what}": NUMBER for kind in ("memcpy", "memset") for what in ("s", "_us")},
    **dict.fromkeys(("operator_us", "host_us"), NUMBER),
    **dict.fromkeys(("operators", "kernels", "calls"), dict),
}
"""What of a profile is told, where it is there."""
ENTRY: dict[str, Types] = {"count": NUMBER, "us": NUMBER}
"""A profile says it of each kernel and operator."""
SHORTEST, LONGEST = 1e-9, 1e12
"""Milliseconds or microseconds of what was timed: beyond them no mean and no ratio can be told."""
MOST = 1e18
"""Of any other figure, bytes among them."""
LARGEST = 2**63 - 1
"""Of a whole number: what a 64-bit register holds."""
FIGURE = {"step": "median_tpot_ms", "attention": "median_call_us"}
"""What each kind of measured record has among its metrics, and more than 0."""


def complete(record: Record) -> Record:
    """The record, whose configuration names the cell and whose figures are there.

    Raises:
        BadRecord: It lacks one, or one is of another type.
    """
    for group, keys in CONFIG.items():
        part = record.config.get(group)
        if not isinstance(part, dict):
            raise BadRecord(f"config.{group} is {_called(part)}")
        _check(part, keys, f"config.{group}")
    for name in ("context", "batch_size"):
        if not 1 <= record.config["protocol"][name] <= LARGEST:
            raise BadRecord(f"config.protocol.{name} is less than 1, or too large")
    for name in ("peak_bandwidth_gbs", "price_usd_per_hour"):
        _check_reach([record.config["gpu"][name] or 1], f"config.gpu.{name}")
    if not isinstance(commit := record.environment.get("git", {}).get("commit", ""), str):
        raise BadRecord(f"environment.git.commit is {_called(commit)}")
    if record.outcome is Outcome.OK:
        _check_measured(record)
        name = FIGURE[record.kind]
        if record.metrics.get(name, 0) <= 0:
            raise BadRecord(f"the outcome is ok and there is no {name}")
        if record.kind == "step" and not isinstance(record.study.get("p50_ms"), NUMBER):
            raise BadRecord("the outcome is ok and there is no p50_ms")
    return record


def _check_measured(record: Record) -> None:
    """Refuse times that nothing takes, and what the worker says beside them in a form that no worker has.

    Raises:
        BadRecord: There is some of it.
    """
    _check_reach([*record.step_times_ms, *record.call_times_us], "a time")
    if not all(abs(value) <= MOST for value in record.metrics.values()):
        raise BadRecord(f"a metric is beyond {MOST:g}")
    said = record.measured
    if record.kind == "attention":
        _check({"calls_a_launch": 1, **said}, {"sdp_enabled": dict, "calls_a_launch": int}, "measured")
    if "profile" not in said:
        return
    if not isinstance(profile := said["profile"], dict):
        raise BadRecord(f"measured.profile is {_called(profile)}")
    _check(profile, {key: PROFILE[key] for key in profile.keys() & PROFILE.keys()}, "measured.profile")
    for part in ("operators", "kernels"):
        for name, entry in profile.get(part, {}).items():
            if not isinstance(entry, dict):
                raise BadRecord(f"measured.profile.{part}.{name} is {_called(entry)}")
            _check(entry, ENTRY, f"measured.profile.{part}.{name}")


def _check_reach(values: Iterable[float], what: str) -> None:
    if not all(SHORTEST <= value <= LONGEST for value in values):
        raise BadRecord(f"{what} is not between {SHORTEST:g} and {LONGEST:g}")


def _check(part: Mapping[str, Any], keys: Mapping[str, Types], where: str) -> None:
    for key, kind in keys.items():
        value = part.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadRecord(f"{where}.{key} is {_called(value)}")


def _called(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"

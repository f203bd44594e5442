"""What a record has to hold before a table, a report or a file of the study's is made of it.

A record can be kept and imported whatever stands in its configuration and its measurement: those are the worker's and
a plugin's. What is told of it reads some of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome
from registry.record import BadRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    if record.config["protocol"]["batch_size"] < 1:
        raise BadRecord("config.protocol.batch_size is less than 1")
    if record.outcome is Outcome.OK:
        name = FIGURE[record.kind]
        if record.metrics.get(name, 0) <= 0:
            raise BadRecord(f"the outcome is ok and there is no {name}")
        if record.kind == "step" and not isinstance(record.study.get("p50_ms"), NUMBER):
            raise BadRecord("the outcome is ok and there is no p50_ms")
    return record


def _check(part: Mapping[str, Any], keys: Mapping[str, Types], where: str) -> None:
    for key, kind in keys.items():
        value = part.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadRecord(f"{where}.{key} is {_called(value)}")


def _called(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"

"""On what a report's runs were measured: device, software, code, dates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.report.labels import tiers, varying
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from registry.report.observation import Observation

TOLD = ("torch", "transformers")
"""Packages whose versions are named."""


def facts(observations: Sequence[Observation]) -> list[str]:
    """A line each; what differs from run to run is told with every value that it has."""
    found = [one.record for one in observations]
    if not found:
        return ["no run"]
    environments = [record.environment for record in found]
    devices = [environment.get("device", {}) for environment in environments]
    lines = [f"device: {_all(one.device for one in observations)}"]
    if drivers := _all(device.get("driver", "") for device in devices):
        lines.append(f"driver: {drivers}")
    for package in TOLD:
        lines.append(f"{package}: {_all(e.get('versions', {}).get(package, '') for e in environments)}")
    lines.append(
        f"rfloor's commit: {_all(e.get('git', {}).get('commit', '')[:12] for e in environments) or 'not known'}"
    )
    days = [record.started_at[:10] for record in found]
    lines.append(f"measured: {min(days)}" if min(days) == max(days) else f"measured: {min(days)} to {max(days)}")
    measured = cells(observations)
    differing = varying(measured)
    same = [f"{axis}={value}" for axis, value in tiers(measured[0])[0].items() if axis not in differing]
    return [*lines, f"every cell: {' '.join(same)}"]


def _all(values: Iterable[str]) -> str:
    """The distinct values, in order."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))

"""On what a report's runs were measured: device, software, code, dates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.report.labels import PACKAGES, tiers
from registry.report.observation import cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from registry.report.observation import Observation


def facts(observations: Sequence[Observation]) -> list[str]:
    """A line each; what differs from run to run is told with every value that it has."""
    found = [one.record for one in observations]
    if not found:
        return ["no run"]
    environments = [record.environment for record in found]
    devices = [environment.get("device", {}) for environment in environments]
    lines = [f"device: {_all(_cards(observations))}"]
    if drivers := _all(device.get("driver", "") for device in devices):
        lines.append(f"driver: {drivers}")
    versions = [environment.get("versions", {}) for environment in environments]
    others = sorted({name for each in versions for name in each} - {*PACKAGES})
    for package in [*PACKAGES, *others]:
        lines.append(f"{package}: {_all(each.get(package, '') for each in versions) or 'not known'}")
    lines.append(f"rfloor's commit: {_all(_commit(e.get('git', {})) for e in environments) or 'not known'}")
    days = [record.started_at[:10] for record in found]
    lines.append(f"measured: {min(days)}" if min(days) == max(days) else f"measured: {min(days)} to {max(days)}")
    measured = cells(observations)
    chosen = [tiers(one)[0] for one in measured]
    same = [f"{axis}={value}" for axis, value in chosen[0].items() if all(each.get(axis) == value for each in chosen)]
    return [*lines, f"every cell: {' '.join(same)}"]


def _cards(observations: Sequence[Observation]) -> list[str]:
    """The devices' names, each with how many of them there were if that is more than one."""
    cards: dict[str, set[str]] = {}
    for one in observations:
        uuid = str(one.record.environment.get("device", {}).get("uuid", ""))
        cards.setdefault(one.device, set()).update({uuid} - {""})  # a processor has none
    return [f"{name} ({len(uuids)} cards)" if name and len(uuids) > 1 else name for name, uuids in cards.items()]


def _commit(git: Mapping[str, str]) -> str:
    """The commit, and whether the code was not as it stands there."""
    commit = git.get("commit", "")[:12]
    return (
        f"{commit} with changes that are in no commit"
        if commit and str(git.get("dirty")).lower() == "true"
        else commit
    )


def _all(values: Iterable[str]) -> str:
    """The distinct values, in order."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))

"""How a report writes cells and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.display import AXES, axes_of
from registry.schema import what_decides

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.report.observation import Measured

NUMBERS = ("warmup_steps", "measured_steps", "threads")
"""The protocol's numbers beside those that `registry.display` tells."""
PACKAGES = ("torch", "transformers", "rfloor")
"""Whose versions are told first."""


def tiers(one: Measured) -> list[dict[str, str]]:
    """A cell's place on every axis, in the order in which axes are asked for what tells it from others.

    First the choices and the protocol's numbers; then every other value of the configuration; then what it ran on
    and with; last its identity, which differs where only the code did.
    """
    config, environment = what_decides(one.config), one.observations[0].record.environment
    protocol = config["protocol"]
    chosen = axes_of(config) | {key: str(protocol[key]) for key in NUMBERS if protocol.get(key) is not None}
    device, versions, git = (environment.get(key, {}) for key in ("device", "versions", "git"))
    ran = {"device": one.device, "driver": str(device.get("driver", ""))}
    ran |= {name: str(versions.get(name, "")) for name in [*PACKAGES, *sorted({*versions} - {*PACKAGES})]}
    ran |= {"commit": str(git.get("commit", ""))[:8], "dirty": str(git.get("dirty", ""))}
    return [chosen, _leaves(config), ran, {"cell": one.observations[0].record.cell_id[:8], "copy": str(one.copy)}]


def _leaves(part: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in part.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


def telling(places: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """The axes that tell cells apart: all of the first tier that vary, of the others what equal labels still need.

    Of a later tier a value that a cell's record lacks tells it from none: an older version knew no such key.

    Args:
        places: Of each cell its tiers, as `tiers` gives them.
    """
    axes: list[str] = []
    for number, _ in enumerate(places[0] if places else ()):
        whole = [{axis: value for tier in place[: number + 1] for axis, value in tier.items()} for place in places]
        groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
        for cell, place in zip(whole, places, strict=True):
            groups.setdefault(tuple(cell.get(axis, "") for axis in axes), []).append(place[number])
        names = dict.fromkeys(axis for group in groups.values() for place in group for axis in place)
        axes += [axis for axis in names if any(_differ(group, axis, absent=number == 0) for group in groups.values())]
    return _without_implied(axes, [place[0] for place in places])


def _differ(group: Sequence[Mapping[str, str]], axis: str, absent: bool) -> bool:
    """Whether cells have different values on an axis; `absent`: whether none counts as one."""
    return len({place.get(axis, "") for place in group if absent or axis in place}) > 1


def _without_implied(axes: list[str], chosen: Sequence[Mapping[str, str]]) -> list[str]:
    """Without the cache where it is each execution's own, and no choice of these cells."""
    both = {(place.get("execution"), place.get("cache")) for place in chosen}
    own = "execution" in axes and len(both) == len({execution for execution, _ in both})
    return [axis for axis in axes if not (own and axis == "cache")]


def varying(found: Sequence[Measured]) -> list[str]:
    """The axes that tell these cells apart, one at least: with them no two have the same label."""
    return telling([tiers(one) for one in found]) or ["model"]


def label(one: Measured, axes: Sequence[str]) -> list[str]:
    """What stands in a cell's row: its place on each axis."""
    told = {axis: value for tier in tiers(one) for axis, value in tier.items()}
    return [told.get(axis, "") for axis in axes]


def named(one: Measured, axes: Sequence[str]) -> str:
    """The same in a sentence or a picture, where no heading says what a number is."""
    told = zip(axes, label(one, axes), strict=True)
    return " ".join(value if axis in AXES else f"{axis}={value}" for axis, value in told)


def number(value: float | None, digits: int) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def counted(count: int, name: str) -> str:
    """A number of things: 1 session, 10 sessions."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def percent(fraction: float | None) -> str:
    """A coefficient of variation, or nothing for one session."""
    return "" if fraction is None else f"{fraction:.2%}"

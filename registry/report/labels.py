"""How a report writes cells and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.display import AXES, axes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes in which cells differ, one at least."""
    told = [axes_of(config) for config in configs]
    names = list(told[0]) if told else []
    return [name for name in names if len({axes[name] for axes in told}) > 1] or names[:1]


def label(config: Mapping[str, Any], axes: Sequence[str]) -> list[str]:
    """What stands in a cell's row: its place on each axis."""
    told = axes_of(config)
    return [told[axis] for axis in axes]


def named(config: Mapping[str, Any], axes: Sequence[str]) -> str:
    """The same in a picture, where no heading says what a number is."""
    told = axes_of(config)
    return " ".join(told[axis] if axis in AXES else f"{axis}={told[axis]}" for axis in axes)


def number(value: float | None, digits: int) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(fraction: float | None) -> str:
    """A coefficient of variation, or nothing for one session."""
    return "" if fraction is None else f"{fraction:.2%}"

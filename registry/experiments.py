"""Named experiments: which of their cells are compared, and of which cells a claim or a figure speaks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from registry.outcome import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.plan import Cell
    from registry.schema import ClaimConfig


def blocks(overrides: Sequence[Sequence[str]], cells: Sequence[Cell]) -> list[int]:
    """The number of each cell's block: those that an experiment compares share one, every other has its own.

    Args:
        overrides: Each cell's.
        cells: The same, planned.

    Raises:
        BadInput: A block lacks one of the arms that its experiment compares.
    """
    members: dict[object, list[int]] = {}
    for place, (texts, cell) in enumerate(zip(overrides, cells, strict=True)):
        group = cell.config.experiment.arms
        rest = tuple(text for text in texts if not text.startswith(f"{group}="))
        members.setdefault(rest if group else place, []).append(place)
    numbers = [0] * len(cells)
    for number, places in enumerate(members.values()):
        _check_arms([cells[place] for place in places])
        for place in places:
            numbers[place] = number
    return numbers


def _check_arms(block: Sequence[Cell]) -> None:
    experiment = block[0].config.experiment
    if experiment.arms is None:
        return
    found = [getattr(cell.config, experiment.arms).name for cell in block]
    for arm in (experiment.baseline, experiment.candidate):
        if arm not in found:
            raise BadInput(
                f"experiment={experiment.name} compares {experiment.arms}={experiment.baseline} with "
                f"{experiment.arms}={experiment.candidate}, and the call leaves {arm} out: give no {experiment.arms}="
            )


def applies(claim: ClaimConfig, peak_bandwidth_gbs: float | None) -> bool:
    """Whether a claim is made of a GPU with this spec bandwidth, GB/s; of one without a spec sheet none is."""
    return (
        peak_bandwidth_gbs is not None
        and (claim.above_gbs is None or peak_bandwidth_gbs > claim.above_gbs)
        and (claim.below_gbs is None or peak_bandwidth_gbs < claim.below_gbs)
    )


def matches(config: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a configuration in its plain form has the values of dotted keys; of a list one of its values."""
    return all(value_of(config, key) in _choices(wanted) for key, wanted in where.items())


def places(where: Mapping[str, Any]) -> int:
    """How many cells the values of dotted keys describe: as many as their lists have combinations."""
    return math.prod(len(_choices(wanted)) for wanted in where.values())


def _choices(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """What a configuration in its plain form has under a dotted key; `None` for nothing."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node

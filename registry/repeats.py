"""Which records are sessions of one cell."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from registry.record import Record

T = TypeVar("T")


def by_cell(items: Iterable[T], record: Callable[[T], Record]) -> dict[tuple[str, int], list[T]]:
    """The sessions of each cell, by its identity and copy.

    A cell is what was measured: other code, another driver or another version of a package makes another one. One
    that a call asks for twice is measured twice in each session, and so is two, the second of them copy 1.

    Args:
        items: In the order in which they were measured.
        record: An item's.
    """
    groups: dict[tuple[str, int], list[T]] = {}
    met: Counter[tuple[str, str, int]] = Counter()
    for item in items:
        one = record(item)
        place = one.cell_id, one.sweep_id, one.session
        groups.setdefault((one.cell_id, met[place]), []).append(item)
        met[place] += 1
    return groups

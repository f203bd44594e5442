"""In which order the cells of a call run: sessions of blocks, the arms of a block back to back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def order(blocks: Sequence[int], sessions: int, seed: int) -> list[tuple[int, int]]:
    """When each cell is measured: every cell once a session, the cells of one block next to each other.

    In each session the blocks come in random order, and so do the cells of each: a machine that warms up or slows
    down in the course of a call then favours no arm and no context. A single session of cells that are not compared
    keeps the order in which they were typed.

    Args:
        blocks: For each cell the number of its block.
        sessions: How often each cell is measured.
        seed: Of the order.

    Returns:
        Session (from 0) and cell, in order.
    """
    if sessions == 1 and len(set(blocks)) == len(blocks):
        return [(0, cell) for cell in range(len(blocks))]
    dice = random.Random(seed)
    found = []
    for session in range(sessions):
        members: dict[int, list[int]] = {}
        for cell, block in enumerate(blocks):
            members.setdefault(block, []).append(cell)
        shuffled = [*members.values()]
        dice.shuffle(shuffled)
        for cells in shuffled:
            dice.shuffle(cells)
            found += [(session, cell) for cell in cells]
    return found

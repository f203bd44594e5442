"""In which order the cells of a call run: sessions of blocks, the arms of a block back to back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def order(blocks: Sequence[int], sessions: int, seed: int) -> list[tuple[int, int]]:
    """When each cell is measured: every cell once a session, the cells of one block next to each other.

    In each session the blocks come in random order. The cells of a block are turned round from session to session, in
    random order too, so that each leads as often as any other (as nearly as the number of sessions allows): a machine
    that warms up or slows down in the course of a call then favours no arm and no context. A single session of cells
    that are not compared keeps the order in which they were typed.

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
    members: dict[int, list[int]] = {}
    for cell, block in enumerate(blocks):
        members.setdefault(block, []).append(cell)
    turns = [_turns(cells, sessions, dice) for cells in members.values()]
    found = []
    for session in range(sessions):
        dice.shuffle(turns)
        found += [(session, cell) for turn in turns for cell in turn[session]]
    return found


def _turns(cells: list[int], sessions: int, dice: random.Random) -> list[list[int]]:
    """The order of a block's cells in each session."""
    dice.shuffle(cells)
    turned = [cells[lead:] + cells[:lead] for lead in range(len(cells))]
    found: list[list[int]] = []
    while len(found) < sessions:
        found += dice.sample(turned, min(len(turned), sessions - len(found)))
    dice.shuffle(found)
    return found

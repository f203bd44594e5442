"""How the int4 kernel is launched for a shape on a device: a table, `launches.yaml`, and a rule for what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from backends.int4.layout import GROUP, ROWS
from backends.tiles import Place, Table

TABLE = Path(__file__).with_name("launches.yaml")
WARPS = (14, 8, 7, 4)
"""Of a block: what the kernel is compiled for."""
FULL = 0.9
"""Least share of the warps' turns in which they have a group."""
WARPS_A_PROCESSOR = 28
"""As many as its registers have room for."""


@dataclass(frozen=True)
class Launch:
    """How a product is launched.

    Attributes:
        warps: Of a block; they share out a tile's groups.
        blocks: A processor.
        ahead: How many of its tiles a block has come into L2 while it waits for the kernel ahead.
    """

    warps: int
    blocks: int
    ahead: int = 0


class Arguments(NamedTuple):
    """What the kernel takes.

    Attributes:
        warps: As `Launch` has them.
        blocks: Of all processors.
        ahead: As `Launch` has it.
    """

    warps: int
    blocks: int
    ahead: int


class Launches(Table):
    """The launches that are known."""

    def launch(self, device: str, tiles: int, groups: int) -> Arguments:
        """For a weight of so many tiles of rows and groups of columns.

        Args:
            device: As torch names it.
            tiles: As the packed words have them.
            groups: A row.
        """
        name, processors = _device(device)
        found = self.find(Place(name, "int4", tiles * ROWS, groups * GROUP))
        how = Launch(**found) if found else fitting(groups)
        return Arguments(how.warps, processors * how.blocks, how.ahead)


def fitting(groups: int) -> Launch:
    """The most warps that have a group nearly always, and blocks as many as a processor has room for."""
    turns = {warps: -(-groups // warps) * warps for warps in WARPS}
    warps = next((w for w in WARPS if groups / turns[w] >= FULL), WARPS[-1])
    return Launch(warps, WARPS_A_PROCESSOR // warps)


@cache
def table() -> Launches:
    """The one that rfloor comes with."""
    return Launches.read(TABLE)


@cache
def _device(device: str) -> tuple[str, int]:
    import torch

    found = torch.cuda.get_device_properties(device)
    return found.name, found.multi_processor_count

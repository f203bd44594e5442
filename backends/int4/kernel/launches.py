"""How the product is launched for a shape on a device: a table, `launches.yaml`, and a rule for what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from backends.int4.layout import GROUP, ROWS
from backends.tiles import Place, Table

TABLE = Path(__file__).with_name("launches.yaml")
PRODUCT = "int4"
"""In the words of a `Place`."""
WARPS = (32, 28, 16, 14, 8, 7, 4)
"""Of a block: what the kernel is compiled for."""
SHARED_BYTES = 180_000
"""Of shared memory for activations: a block may have 227 KiB on compute capability 9.0, and sums and the groups'
units take up to 28 of them."""
FULL = 0.9
"""Least share of the warps' turns in which they have a group."""
WIDEST = 16
"""Warps of a block beside which a processor has room for another."""


@dataclass(frozen=True)
class Launch:
    """How a product is launched.

    Attributes:
        warps: Of a block; they share out a tile's groups.
        blocks: A processor.
    """

    warps: int
    blocks: int


class Arguments(NamedTuple):
    """What the kernel takes.

    Attributes:
        warps: As `Launch` has them.
        blocks: Of all processors.
    """

    warps: int
    blocks: int


class Launches(Table):
    """The launches that are known."""

    def launch(self, device: str, tiles: int, groups: int, streams: int) -> Arguments:
        """For a weight of so many tiles of rows and groups of columns, as the packed words have them.

        Where nothing is known of so many streams, what is known of one holds: the weight is most of what is read.
        """
        name, processors = _device(device)
        place = Place(name, PRODUCT, tiles * ROWS, groups * GROUP, streams)
        found = self.find(place) or self.find(replace(place, streams=1))
        launch = Launch(**found) if found else fitting(groups)
        return Arguments(launch.warps, processors * launch.blocks)


def has_room(streams: int, columns: int) -> bool:
    """Whether a block has room for the activations of so many streams."""
    return 2 * streams * columns <= SHARED_BYTES


def resident(warps: int) -> int:
    """Blocks of so many warps that a processor's registers have room for, as product.cu is compiled for it."""
    return (28 if warps % 16 else 32) // warps


def fitting(groups: int) -> Launch:
    """The most warps that have a group nearly always, and blocks as many as a processor has room for."""
    turns = {warps: -(-groups // warps) * warps for warps in WARPS if warps <= WIDEST}
    warps = next((w for w in turns if groups / turns[w] >= FULL), WARPS[-1])
    return Launch(warps, resident(warps))


@cache
def table() -> Launches:
    """The one that rfloor comes with."""
    return Launches.read(TABLE)


@cache
def _device(device: str) -> tuple[str, int]:
    import torch

    found = torch.cuda.get_device_properties(device)
    return found.name, found.multi_processor_count

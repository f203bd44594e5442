"""Which tile a kernel takes for a shape on a device: a table, `tiles.yaml`, that `bench/fused_tiles.py` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from backends.tiles import Place, Table

TABLE = Path(__file__).with_name("tiles.yaml")
WARP, VECTOR = 32, 8
"""Threads, and columns of a row that a thread loads at a time."""
PRODUCTS = ("qkv", "out", "swiglu", "down", "head")


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: Of the weight, a program; pairs of rows where the product pairs them.
        columns: Of the weight, at a time.
        warps: Of a program.
        depth: How many such tiles a program has under way.
    """

    rows: int
    columns: int
    warps: int
    depth: int = 2


@dataclass(frozen=True)
class Parts:
    """How a cache is cut.

    Attributes:
        parts: Programs a key head and stream.
        rows: Of the cache, at a time.
        warps: Of a program.
    """

    parts: int
    rows: int
    warps: int


class Tiles(Table):
    """The tiles that are known; each product has one for any device."""

    def tile(self, place: Place, unit: int) -> Tile:
        """For a weight: one that is no larger than it has to be, and whose rows divide `unit`."""
        tile, columns = Tile(**(self.find(place) or {})), place.columns
        while unit % tile.rows:
            tile = replace(tile, rows=tile.rows // 2)
        wide = min(tile.columns, _power(columns))
        warps = min(tile.warps, max(1, wide // (WARP * VECTOR)))
        return replace(tile, columns=wide, warps=warps, depth=min(tile.depth, -(-columns // wide)))

    def parts(self, device: str, capacity: int, heads: int) -> Parts:
        """For a cache of this many rows, `heads` of key heads and streams together."""
        found = Parts(**(self.nearest(Place(device, "attention", capacity, heads)) or {}))
        return replace(found, parts=min(found.parts, -(-capacity // found.rows)))


@cache
def table() -> Tiles:
    """The one that rfloor comes with."""
    return Tiles.read(TABLE)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()

"""Which tile a kernel takes for a shape on a device: a table, `tiles.yaml`, that `bench/fused_tiles.py` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tiles.yaml")
ANY = "any"
PRODUCTS = ("qkv", "out", "swiglu", "down", "head")


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: Of the weight, a program; pairs of rows where the product pairs them.
        columns: Of the weight, at a time.
        warps: Of a program.
    """

    rows: int
    columns: int
    warps: int


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


@dataclass(frozen=True)
class Place:
    """What a table's row is for; `ANY` and 0 are every device and extent.

    Attributes:
        device: As the driver names it.
        product: One of `PRODUCTS`, or `attention`.
        rows: Of the weight; of the cache.
        columns: Of the weight; heads of the cache, all streams' together.
    """

    device: str
    product: str
    rows: int = 0
    columns: int = 0

    def general(self) -> list[Place]:
        """This place and what holds for it where nothing else is known, the nearest first."""
        return [self, replace(self, rows=0, columns=0), Place(ANY, self.product)]


class Table:
    """The tiles that are known.

    Args:
        rows: As `tiles.yaml` has them.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._known = {Place(**row["place"]): row["tile"] for row in rows}

    def tile(self, device: str, product: str, rows: int, columns: int, unit: int) -> Tile:
        """For a weight `[rows, columns]`: one that is no wider than it has to be, and whose rows divide `unit`."""
        tile = Tile(**self._find(Place(device, product, rows, columns)))
        while unit % tile.rows:
            tile = replace(tile, rows=tile.rows // 2)
        return replace(tile, columns=min(tile.columns, _power(columns)))

    def parts(self, device: str, capacity: int, heads: int) -> Parts:
        """For a cache of this many rows, `heads` of key heads and streams together: no part is without a row."""
        found = Parts(**self._find(Place(device, "attention", capacity, heads)))
        return replace(found, parts=min(found.parts, -(-capacity // found.rows)))

    def _find(self, place: Place) -> dict[str, int]:
        return next(self._known[one] for one in place.general() if one in self._known)

    def known(self) -> list[dict[str, Any]]:
        """The rows, as `tiles.yaml` has them."""
        return [{"place": vars(place), "tile": tile} for place, tile in self._known.items()]

    def set(self, place: Place, tile: Tile | Parts) -> None:
        """Know better from now on."""
        self._known[place] = vars(tile)


@cache
def table() -> Table:
    """The one that rfloor comes with."""
    import yaml

    return Table(yaml.safe_load(TABLE.read_text()))


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()

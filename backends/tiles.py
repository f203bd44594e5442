"""What is known of how kernels cut their work best: tables by device and shape, in files that benches write."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

ANY = "any"


@dataclass(frozen=True)
class Place:
    """What a table's row is for; `ANY` and 0 are every device and extent.

    Attributes:
        device: As the driver names it.
        product: Which kernel, in the step's words.
        rows: Of the weight; of the cache.
        columns: Of the weight; heads of the cache, all streams' together.
        streams: At a time; 0 where there may be any.
    """

    device: str
    product: str
    rows: int = 0
    columns: int = 0
    streams: int = 0

    def general(self) -> list[Place]:
        """This place and what holds for it where nothing else is known, the nearest first."""
        shapes = [self, replace(self, streams=0)]
        anywhere = Place(ANY, self.product, streams=self.streams)
        return [*shapes, *(replace(one, rows=0, columns=0) for one in shapes), anywhere, Place(ANY, self.product)]


class Table:
    """What is known.

    Args:
        rows: As the file has them: `place`, and `cut`, what a kernel takes.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._known = {Place(**row["place"]): row["cut"] for row in rows}

    @classmethod
    def read(cls, path: Path) -> Self:
        """A file's."""
        import yaml

        return cls(yaml.safe_load(path.read_text()) or [])

    def find(self, place: Place) -> dict[str, Any] | None:
        """The nearest that is known, if anything is."""
        return next((self._known[one] for one in place.general() if one in self._known), None)

    def nearest(self, place: Place) -> dict[str, Any] | None:
        """Of the same device, product and columns, what is known of the nearest number of rows."""
        found = [one for one in self._known if one.rows and replace(one, rows=place.rows) == place]
        best = min(found, key=lambda one: abs(math.log(one.rows / place.rows)), default=None)
        return self._known[best] if best else self.find(place)

    def exactly(self, place: Place) -> dict[str, Any] | None:
        """What is known of this place itself."""
        return self._known.get(place)

    def known(self) -> list[dict[str, Any]]:
        """The rows, as a file has them."""
        return [{"place": vars(place), "cut": cut} for place, cut in self._known.items()]

    def set(self, place: Place, cut: Any) -> None:
        """Know better from now on.

        Args:
            place: Where.
            cut: A dataclass of what the kernel takes.
        """
        self._known[place] = vars(cut)

    def restore(self, place: Place, cut: dict[str, Any] | None) -> None:
        """Have a place as `exactly` gave it."""
        if cut is None:
            self._known.pop(place, None)
        else:
            self._known[place] = cut

    def write(self, path: Path) -> None:
        """Into a file, below what it says of itself."""
        import yaml

        def row(place: dict[str, Any], cut: dict[str, Any]) -> str:
            told = {"place": {key: value for key, value in place.items() if value}, "cut": cut}
            return "- " + yaml.safe_dump(told, default_flow_style=True, sort_keys=False, width=1000)

        head = [line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")]
        path.write_text("".join([*head, *(row(**one) for one in self.known())]))

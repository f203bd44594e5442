"""An override's values, and how many cells they make: counted before they are listed, a range may be endless."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import RangeSweep

from registry.outcome import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hydra.core.override_parser.types import Override

MOST = 10_000
"""Cells of a sweep, each as often as it has sessions. At ten seconds each they take a day; a typing error may ask for
any number."""
TOLD = 60
"""Characters of an override that a message repeats."""


def texts(override: Override) -> list[str]:
    """Each of an override's values as an override of its own.

    Raises:
        BadInput: They are too many, or endless.
    """
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if isinstance(swept := override.value(), RangeSweep):
        check_count(_length(swept, override.input_line or ""), override.input_line or "")
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    check_count(len(found), override.input_line or "")
    return found


def check_product(axes: Iterable[list[str]]) -> None:
    """Refuse axes that make more cells together than anybody can want.

    Raises:
        BadInput: They do.
    """
    check_count(math.prod(len(values) for values in axes), "the axes of this sweep")


def check_count(cells: float, what: str) -> None:
    """Refuse a number of cells.

    Raises:
        BadInput: It is larger than `MOST`.
    """
    if cells > MOST:
        told = what if len(what) <= TOLD else f"{what[:TOLD]}..."
        raise BadInput(f"{told}: {cells:g} cells; a sweep has {MOST} at most, each as often as it has sessions")


def _length(swept: RangeSweep, text: str) -> float:
    """How many values a range has."""
    start, stop, step = swept.start or 0, swept.stop or 0, swept.step
    if not all(map(math.isfinite, (start, stop, step))) or step == 0:
        raise BadInput(f"{text}: a range has finite ends and a step that is not 0")
    if all(isinstance(one, int) for one in (start, stop, step)):
        return max(0, -((start - stop) // step))
    return max(0.0, (float(stop) - float(start)) / float(step))

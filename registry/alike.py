"""Sentences that differ in their numbers alone, told as one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBER = re.compile(r"(?<![\w.#])\d+(?:\.\d+)?(?![\w.]*\w)")
"""A number that is no part of a word or a version."""


def words(text: str) -> tuple[str, ...]:
    """What sentences that differ in their numbers alone have in common: what stands between these."""
    return tuple(NUMBER.split(text))


def as_one(texts: Sequence[str]) -> str:
    """Sentences of the same words as one, with the least and the greatest of each number."""
    ranges = []
    for column in zip(*map(NUMBER.findall, texts), strict=True):
        least, greatest = min(column, key=float), max(column, key=float)
        ranges.append(least if float(least) == float(greatest) else f"{least} to {greatest}")
    return "".join(part for pair in zip(words(texts[0]), [*ranges, ""], strict=True) for part in pair)

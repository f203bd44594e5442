"""How a cell ends, and the two ways in which rfloor says no.

`BadInput` is the caller's mistake: the whole call is refused before anything starts, exit code 2.
`Refused` is one cell's own end: the rest of the sweep goes on.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Outcome(StrEnum):
    """The eight ends of a cell; every cell has exactly one."""

    OK = "ok"
    OOM = "oom"
    UNSUPPORTED = "unsupported"
    MISSING_DEPENDENCY = "missing_dependency"
    INCORRECT = "incorrect"
    TIMEOUT = "timeout"
    CRASH = "crash"
    INTERRUPTED = "interrupted"

    @property
    def benign(self) -> bool:
        """Whether a sweep with this outcome may still exit with 0: the machine answered, if only with a no."""
        return self in (Outcome.OK, Outcome.OOM, Outcome.UNSUPPORTED)


@dataclass(frozen=True)
class Refusal:
    """Why a cell was not measured.

    Attributes:
        outcome: The cell's outcome.
        reason: What and why, one sentence.
        remedy: What would work: a command or a setting. May be empty where nothing would.
    """

    outcome: Outcome
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}".strip() if self.remedy else self.reason


class BadInput(Exception):
    """The call cannot be meant as it was typed; nothing was started and nothing was written."""


class Refused(Exception):
    """Raised by the harness or a plugin to end one cell with a typed outcome."""

    def __init__(self, outcome: Outcome, reason: str, remedy: str = "") -> None:
        self.refusal = Refusal(outcome, reason, remedy)
        super().__init__(str(self.refusal))


def unsupported(reason: str, remedy: str = "") -> Refused:
    """The refusal a plugin raises for a shape, device or combination that it cannot run."""
    return Refused(Outcome.UNSUPPORTED, reason, remedy)


def nearest(word: str, choices: Iterable[str]) -> str:
    """'Did you mean' and the full list, ready to end an error message.

    Args:
        word: What was typed.
        choices: What exists.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(known)}" if known else "none is known"

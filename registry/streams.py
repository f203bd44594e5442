"""What this process prints, without secrets: whoever prints it, tables, tracebacks and other libraries' warnings.

Nor without telling what a terminal would obey or turn about: a record is a file, and may come from anybody.
Nothing that is printed may cost a measurement: where nobody is left to read it, it is lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.redact import Redactor, environment_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


OBEYED = re.compile(
    "\x1b(?!\\[[0-9;?]*[A-Za-z])|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]"
    "|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""What a terminal obeys, or writes from right to left for; but for colours and moves of the cursor, as tables and the
progress have them: those in their texts are taken from them beforehand (`visible`)."""


def visible(text: str) -> str:
    """`text` with escapes for what does not print; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(one if one in "\n\t" or _prints(one) else _escaped(one) for one in text)


def complain(text: str) -> None:
    """Say on stderr what is wrong."""
    print(f"rfloor: {visible(text)}", file=sys.stderr)


def _prints(one: str) -> bool:
    return one.isprintable() or unicodedata.category(one) == "Zs"


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()


class Hiding:
    """A text stream that hides secrets in each piece that is written to it; in all else the stream behind it.

    What a terminal would obey is escaped.

    One that takes no more is given up: its terminal or its reader is gone, or its disk is full.
    """

    def __init__(self, stream: Any, redactor: Redactor) -> None:
        self.stream = stream
        self._redactor = redactor

    def write(self, text: str) -> int:
        """Write a piece; how long it was."""
        with self._given_up():
            self.stream.write(OBEYED.sub(lambda match: _escaped(match[0]), self._redactor.text(text)))
        return len(text)

    def flush(self) -> None:
        """Pass on what is held back."""
        with self._given_up():
            self.stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several pieces."""
        for line in lines:
            self.write(line)

    @contextlib.contextmanager
    def _given_up(self) -> Iterator[None]:
        """Inside, a stream that fails leads nowhere from then on."""
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError):  # it has no descriptor: each piece is lost by itself
                _lead_nowhere(self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _lead_nowhere(descriptor: int) -> None:
    """Lose what is written to a descriptor: what its stream holds back would fail once more, as the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def hide(known: Iterable[str] = ()) -> None:
    """Hide the environment's secrets, and those given, in what is printed from now on."""
    redactor = Redactor(environment_secrets(os.environ).union(known))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the call was begun without it
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it stays open
        setattr(sys, name, Hiding(stream.stream if isinstance(stream, Hiding) else stream, redactor))

"""What this process prints, without secrets: whoever prints it, tables, tracebacks and other libraries' warnings."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from registry.redact import Redactor, environment_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable


class Hiding:
    """A text stream that hides secrets in each piece that is written to it; in all else the stream behind it."""

    def __init__(self, stream: Any, redactor: Redactor) -> None:
        self.stream = stream
        self._redactor = redactor

    def write(self, text: str) -> int:
        """Write a piece; how long it was."""
        self.stream.write(self._redactor.text(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several pieces."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def hide(known: Iterable[str] = ()) -> None:
    """Hide the environment's secrets, and those given, in what is printed from now on."""
    redactor = Redactor(environment_secrets(os.environ).union(known))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, Hiding(stream.stream if isinstance(stream, Hiding) else stream, redactor))

"""What the cells of one call share: their sweep's name, MLflow while it answers, and the user's interrupt."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from registry.mlflow_client import TrackingDown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from registry.tracking import Tracker

T = TypeVar("T")


@dataclass
class Call:
    """What the cells of one call share.

    Attributes:
        sweep_id: Ties them together.
        tracker: MLflow; `None` when it is down.
        stage: Told what a worker begins.
        registrations: Hash of what was registered of each experiment, by its name.
        tracking_error: Why MLflow is no longer asked, empty while it is.
        interrupted: The user wants the rest of the sweep not to start.
        listening: A worker is being waited for, which an interrupt ends at once.
    """

    sweep_id: str
    tracker: Tracker | None
    stage: Callable[[str], None]
    registrations: dict[str, str] = field(default_factory=dict)
    tracking_error: str = ""
    interrupted: bool = False
    listening: bool = False

    def interrupt(self, *_: object) -> None:
        """Handle SIGINT or SIGTERM: end the worker that is waited for, start no other.

        Outside of that wait nothing is raised: records are written and runs are closed to their end.
        """
        self.interrupted = True
        if self.listening:
            self.listening = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Inside, an interrupt is raised as KeyboardInterrupt, one that came before it too."""
        self.listening = True
        try:
            if self.interrupted:
                raise KeyboardInterrupt
            yield
        finally:
            self.listening = False

    def tracked(self, call: Callable[[Tracker], T]) -> T | None:
        """Call MLflow; once it fails it is left alone, and the records wait for `rfloor import`."""
        if self.tracker is None:
            return None
        try:
            return call(self.tracker)
        except TrackingDown as error:
            self.tracker, self.tracking_error = None, str(error)
            return None

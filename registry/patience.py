"""Asking again for what may pass."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 4.0


def persist(call: Callable[[], T], may_pass: Callable[[Exception], bool], patience_s: float) -> T:
    """Call until it answers.

    Args:
        call: What may fail for a while. It is called again whatever it has done until then.
        may_pass: Whether what it raised may be gone a little later.
        patience_s: Seconds after which no other attempt is begun; one that is under way is waited for.

    Raises:
        Exception: The last that was raised, once there is no use or no time to try again.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:
            if not may_pass(error) or time.monotonic() - start + pause > patience_s:
                raise
        time.sleep(pause * random.uniform(0.5, 1))  # those that met once need not meet again
        pause = min(2 * pause, LONGEST_PAUSE_S)

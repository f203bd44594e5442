"""Named points at which a test lets happen what cannot be done for real without harm: a full disk, a jumping clock.

`RFLOOR_FAULTS` names those that are on, as in `RFLOOR_FAULTS=record.full,clock.back`; without it nothing happens.
"""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime, timedelta

VARIABLE = "RFLOOR_FAULTS"
RECORD_FULL, MLFLOW_FULL, ANSWER_FULL = "record.full", "mlflow.full", "answer.full"
CLOCK_BACK, CLOCK_FORWARD = "clock.back", "clock.forward"
JUMP = timedelta(hours=1)

_asked = 0


def disk(point: str) -> None:
    """Fail as a full disk does, if this point is on.

    Raises:
        OSError: ENOSPC.
    """
    if _on(point):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def now() -> datetime:
    """The time, UTC; every other call finds the clock set back or forward by an hour where that is on."""
    global _asked
    _asked += 1
    hours = (_on(CLOCK_FORWARD) - _on(CLOCK_BACK)) * (_asked % 2 == 0)
    return datetime.now(UTC) + hours * JUMP


def _on(point: str) -> bool:
    return point in os.environ.get(VARIABLE, "").split(",")

"""One GPU, one cell: whoever measures on a device holds it, against every other process and user of the machine.

The lock is flock(2)'s on a file named after the device's UUID. It is held by the sweep and inherited by its worker,
so it is free once both have ended, however they ended. It reaches as far as the folder: into a container only where
that is shared. What disturbs without holding it is told by `registry.hardware.load`.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from registry.locks import LOOK_S, taken
from registry.outcome import Outcome, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from registry.hardware import Device

FOLDER = Path("/tmp")
"""The one folder that every user of a Linux machine may write; TMPDIR is another for each of them."""
LOCKS = Path("/proc/locks")
WAIT, REFUSE = "wait", "refuse"
ON_BUSY = (WAIT, REFUSE)
"""What a sweep may do while another process measures on its device."""


@contextlib.contextmanager
def alone_on(device: Device, on_busy: str, stage: Callable[[str], None]) -> Iterator[int | None]:
    """Hold a GPU; a CPU is everybody's.

    Args:
        device: Its UUID names the lock.
        on_busy: One of `ON_BUSY`.
        stage: Told for whom this waits.

    Yields:
        The descriptor for a child to inherit, `None` where nothing is held.

    Raises:
        Refused: `interrupted`: another process measures on the device, and `on_busy` is `refuse`.
        OSError: The lock's file can neither be opened nor made.
    """
    if device.kind != "cuda" or not device.uuid:
        yield None
        return
    file, told = path(device), False
    while (descriptor := _held(file)) is None:
        if not told:
            who = f"{device.name} {device.uuid} is being measured on by {holder(file)}"
            if on_busy == REFUSE:
                raise Refused(Outcome.INTERRUPTED, who, "on_busy=wait waits for it; resume=true then goes on")
            stage(f"wait: {who}")
            told = True
        time.sleep(LOOK_S)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def path(device: Device) -> Path:
    """The lock's file of a device."""
    return FOLDER / f"rfloor-{device.uuid}.lock"


def holder(file: Path) -> str:
    """Which process holds a file, as far as /proc tells."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        found = file.stat()
        place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        for line in LOCKS.read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and fields[-3] == place and "->" not in fields:
                return f"process {fields[-4]} (user {Path(f'/proc/{fields[-4]}').owner()})"
    return "another process"


def _held(file: Path) -> int | None:
    """The descriptor of a file that is held now, `None` if another process holds it."""
    descriptor = _opened(file)
    try:
        if taken(descriptor) and _is(file, descriptor):
            with contextlib.suppress(OSError):  # another user's
                os.utime(descriptor)  # what cleans old files away leaves it alone
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _opened(file: Path) -> int:
    """A descriptor of the file, which is made if there is none.

    It is opened first without O_CREAT: in a folder such as /tmp Linux (fs.protected_regular) refuses that for a file
    of another user's. Nobody writes to it, so all may read it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(file, flags)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(descriptor, 0o644)  # whatever the umask
            return descriptor


def _is(file: Path, descriptor: int) -> bool:
    """Whether the file under this name is still the one that was opened."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False

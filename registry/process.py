"""Which process a run belongs to, written so that another one can tell whether it has ended."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

PROC = Path("/proc")
MACHINE_ID = Path("/etc/machine-id")


def this_process() -> str:
    """This process, as `has_ended` reads it: host, boot, PID namespace, PID, and when it began.

    A PID is used again; together with its start, in clock ticks since the boot (proc(5), stat's field 22), it is not.
    """
    return json.dumps({**_place(), "pid": os.getpid(), "start": _start(os.getpid())})


def has_ended(told: str) -> bool:
    """Whether a process has surely ended.

    One of another host, of another container or of something unreadable may live: that is no. One of an earlier boot
    of this host does not. A name alone makes no host, since many are called localhost: without a machine's
    id (machine-id(5)), which many containers lack, another boot may be another machine's.
    """
    try:
        process = json.loads(told)
        here = _place()
        if (process["host"], process["machine"]) != (here["host"], here["machine"]):
            return False
        if process["boot"] != here["boot"]:
            return bool(here["machine"])
        return bool(process["namespace"] == here["namespace"] and _start(int(process["pid"])) != process["start"])
    except (ValueError, TypeError, KeyError):
        return False


def _place() -> dict[str, str]:
    """Where PIDs mean what they mean here; the host's name alone where nothing tells the rest.

    Every process of a machine has to find the same: no network card's address is part of it, since without a card
    `uuid.getnode` makes one up, another one in each process.
    """
    return {
        "host": socket.gethostname(),
        "machine": _read(MACHINE_ID),
        "boot": _read(PROC / "sys/kernel/random/boot_id"),
        "namespace": _link(PROC / "self/ns/pid"),
    }


def _start(pid: int) -> str:
    """When a process began; empty if there is none, or if it has ended and waits for its parent."""
    fields = _read(PROC / str(pid) / "stat").rpartition(")")[2].split()  # a name may hold blanks and brackets
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:
        return ""

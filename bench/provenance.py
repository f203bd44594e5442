"""What a bench's answer says of where, when, with what and by which command it was measured."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from typing import Any

from registry.hardware import Device, collect_git, collect_versions, describe

PACKAGES = ("torch", "triton", "transformers")


def provenance(device: Device) -> dict[str, Any]:
    """Of a measurement that this process makes on a device."""
    return {
        "device": describe(device),
        "versions": collect_versions(PACKAGES),
        "git": collect_git(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }

"""Cells as they are planned for machines that are not there."""

from collections.abc import Callable

from registry.hardware import Device
from registry.outcome import Outcome, Refusal
from registry.plan import Cell

H200 = Device("cuda", "NVIDIA H200", 150_000_000_000, "GPU-0", (9, 0), "580.1")
CPU = Device("cpu", "A Processor", 64_000_000_000)

Plan = Callable[..., Cell]


def refused(cell: Cell, outcome: Outcome) -> Refusal:
    assert cell.refusal is not None
    assert cell.refusal.outcome is outcome, cell.refusal
    return cell.refusal

"""What an hour of each GPU costs in a report: one price a GPU, whenever its cells were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.report.observation import Observation


def prices(observations: Sequence[Observation], given: Mapping[str, float]) -> dict[str, float]:
    """Dollars an hour by GPU profile: as given, else as the newest record has it; a GPU without either is left out.

    Args:
        observations: Any runs.
        given: Dollars an hour by GPU profile.
    """
    found: dict[str, float] = {}
    for one in sorted(observations, key=lambda one: one.record.started_at):
        gpu = one.record.config["gpu"]
        if gpu["price_usd_per_hour"]:
            found[gpu["name"]] = gpu["price_usd_per_hour"]
    return found | dict(given)

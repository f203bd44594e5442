"""An experiment's report out of what MLflow holds, whichever sweeps and machines its runs came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry import record as records
from registry import registration as registrations
from registry.outcome import BadInput
from registry.report.build import build, write
from registry.report.observation import Observation
from registry.tracking import RECORD, REGISTRATION, Tracker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from registry.report.document import Report
    from registry.schema import Config


def report(
    config: Config, sweeps: Sequence[str], folder: Path, prices: Mapping[str, float]
) -> tuple[Report, list[Path]]:
    """Write an experiment's report, and log it to the runs of the experiment's sweeps.

    Args:
        config: Names the experiment and where MLflow is.
        sweeps: Only these; all if empty.
        folder: For the page and the Markdown.
        prices: Dollars an hour by GPU profile, over those of the records.

    Returns:
        The report and its files.

    Raises:
        BadInput: There are no such runs.
        TrackingDown: MLflow cannot be reached.
    """
    experiment = config.experiment
    tracker = Tracker(config.tracking)
    own = experiment.name if experiment.cells else ""  # a report without cells of its own tells of all runs
    observations = [
        Observation(records.from_plain(content), run_id)
        for run_id, content in tracker.recorded(RECORD, own)
        if _wanted(content, sweeps)
    ]
    if not observations:
        told = f" of the sweeps {', '.join(sweeps)}" if sweeps else ""
        raise BadInput(
            f"MLflow's {config.tracking.experiment!r} has no runs of experiment={experiment.name}{told}: measure "
            f"them with python runner.py -m experiment={experiment.name}, or rfloor import their records"
        )
    fixed = {
        run_id: registrations.from_json(content)
        for run_id, content in (tracker.recorded(REGISTRATION, own) if own else [])
        if _wanted(content, sweeps)
    }
    found = build(experiment, observations, [*fixed.values()], prices)
    files = write(found, folder)
    for run_id in fixed:
        tracker.close_experiment(run_id, found.verdicts, files)
    return found, files


def _wanted(content: Any, sweeps: Sequence[str]) -> bool:
    return not sweeps or content.get("sweep_id") in sweeps

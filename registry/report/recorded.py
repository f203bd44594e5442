"""An experiment's report out of what MLflow holds, whichever sweeps and machines its runs came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry import record as records
from registry import registration as registrations
from registry.complete import complete
from registry.outcome import BadInput
from registry.report.build import build, write
from registry.report.observation import Observation
from registry.shown import RECORD, REGISTRATION, TRACE
from registry.tracking import Tracker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from registry.record import Record
    from registry.report.document import Report
    from registry.schema import Config


POOLED = "pooled"
"""The folder among a run's artifacts that has the report over several sweeps."""


def report(
    config: Config, sweeps: Sequence[str], folder: Path, prices: Mapping[str, float]
) -> tuple[Report, list[Path], list[str]]:
    """Write an experiment's report, and log it to the runs of the experiment's sweeps.

    Each of these gets what is said of its own registration as its verdict. A report over several sweeps stands in a
    folder of its own beside the report that each sweep ended with. What tells of all runs has a run for its report.

    Args:
        config: Names the experiment and where MLflow is.
        sweeps: Only these; all if empty.
        folder: For the page and the Markdown.
        prices: Dollars an hour by GPU profile, over those of the records.

    Returns:
        The report, its files, and the runs that it leaves out because MLflow holds no record of theirs.

    Raises:
        BadInput: There are no such runs.
        TrackingDown: MLflow cannot be reached.
    """
    experiment = config.experiment
    tracker = Tracker(config.tracking, reading=True)
    own = experiment.name if experiment.cells else ""  # a report without cells of its own tells of all runs
    measured, problems = tracker.recorded(RECORD, _complete, own, sweeps)
    observations = [Observation(record, run_id, _traced(tracker, run_id, record)) for run_id, record in measured]
    if not observations:
        told = f" of the sweeps {', '.join(sweeps)}" if sweeps else ""
        which = f" ({len(problems)} are no records: {problems[0]})" if problems else ""
        measure = f"measure them with python runner.py -m experiment={experiment.name}" if own else "measure some"
        raise BadInput(
            f"MLflow's {config.tracking.experiment!r} has no runs of experiment={experiment.name}{told}{which}: "
            f"{measure}, or rfloor import their records"
        )
    if absent := set(sweeps) - {one.record.sweep_id for one in observations}:
        raise BadInput(f"no run of experiment={experiment.name} is of the sweep {', '.join(sorted(absent))}")
    fixed, unread = tracker.recorded(REGISTRATION, registrations.from_json, own, sweeps) if own else ([], [])
    logged = {one.record_id: tracker.logged(run_id) for run_id, one in fixed}
    found = build(experiment, observations, [registration for _, registration in fixed], prices, logged)
    files = write(found, folder)
    place = POOLED if len(fixed) > 1 else ""
    for run_id, one in fixed:
        tracker.tell_experiment(run_id, found.verdicts.get(one.record_id, ()), files, place)
    if not own:
        tracker.close_experiment(tracker.open_report(experiment), (), files)
    return found, files, [*problems, *unread]


def _traced(tracker: Tracker, run_id: str, record: Record) -> bool:
    """Whether MLflow has the trace of a record's profiled steps; it is asked of those alone that have some."""
    return "profile" in record.measured and tracker.has(run_id, TRACE)


def _complete(content: Any) -> Record:
    """A record of which something can be told.

    Raises:
        BadRecord: It is none.
    """
    return complete(records.from_plain(content))

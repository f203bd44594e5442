"""Records to MLflow after the fact: from machines without network, or once a store is up again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from registry import logs
from registry.archive import everything_in
from registry.locks import locked
from registry.redact import known_secrets
from registry.registration import Registration
from registry.shown import artifacts, tags
from registry.tracking import Tracker

if TYPE_CHECKING:
    from pathlib import Path

    from registry.record import Record
    from registry.schema import TrackingConfig


def import_records(folder: Path, config: TrackingConfig) -> tuple[Counter[str], list[str]]:
    """Log every record under `folder` that MLflow does not have yet; complete the runs that were cut off.

    Two that import the same files at once share the work: a record is held while it is logged (how far that reaches
    says `registry.locks.held`), and whoever holds it looks for its run first. Two that import copies of it in
    the same moment, from two folders or two machines, may both make a run.

    Args:
        folder: Searched with its subfolders.
        config: Where MLflow is.

    Returns:
        How many records were `imported`, `completed` and `present` already, and a line for each file that is
        no record.

    Raises:
        TrackingDown: MLflow cannot be reached.
    """
    tracker = Tracker(config)
    logs.finish_abandoned(folder)
    everything, problems = everything_in(folder)
    known = tracker.known()
    counts: Counter[str] = Counter()
    for file, found in everything:
        own = known.get(found.record_id, ("", False))
        if own[1] and not isinstance(found, Registration):
            counts["present"] += 1
            continue
        with locked(file):
            run_id, complete = tracker.known(found.record_id).get(found.record_id, ("", False))
            if run_id and isinstance(found, Registration):
                complete = not tracker.complete_experiment(run_id, file)
            counts["present" if complete else "completed" if run_id else "imported"] += 1
            if not complete:
                run_id = _import(tracker, found, run_id, file)
        known[found.record_id] = (run_id, True)
    return counts, problems


def _import(tracker: Tracker, found: Record | Registration, run_id: str, file: Path) -> str:
    """Log what MLflow lacks of a record or a registration; its run's id."""
    if isinstance(found, Registration):
        run_id = run_id or tracker.open_experiment(found)
        tracker.complete_experiment(run_id, file)
        return run_id
    tracker.keep_secret(known_secrets(found.config))
    if run_id:
        tracker.log_params(run_id, found.config)
    else:
        run_id = tracker.open(found.record_id, found.label, found.config, tags(found), found.started_at)
    tracker.close(run_id, found, artifacts(file))
    return run_id

"""An experiment's own run: opened with what was registered, closed with its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry import record as records
from registry import registration as registrations
from registry.report.build import build, write
from registry.report.observation import Observation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from registry.call import Call
    from registry.record import Record
    from registry.registration import Logged, Registration
    from registry.report.document import Report
    from registry.tracking import Tracker


@dataclass(frozen=True)
class Opened:
    """An experiment whose cells are about to run.

    Attributes:
        registration: What was fixed beforehand.
        file: Where it lies.
        logged: Its run in MLflow; `None` where MLflow did not take it.
    """

    registration: Registration
    file: Path
    logged: Logged | None


def open_runs(found: Sequence[Registration], folder: Path, call: Call) -> list[Opened]:
    """Register every experiment on disk and in MLflow before anything is measured.

    Args:
        found: One for each experiment of a call.
        folder: Of the records.
        call: MLflow, while it answers.
    """
    return [_open(registration, folder, call) for registration in found]


def _open(registration: Registration, folder: Path, call: Call) -> Opened:
    # In this order, as with a cell: an import that finds the file finds its run too, and makes no second.
    logged = call.tracked(lambda mlflow: _run(mlflow, registration))
    file = registrations.write(registration, folder)
    if logged:
        call.tracked(lambda mlflow: mlflow.log_registration(logged.run_id, file))
    return Opened(registration, file, logged)


def _run(mlflow: Tracker, registration: Registration) -> Logged:
    """Of a sweep that is taken up again the run that it has already."""
    run_id, _ = mlflow.known(registration.record_id).get(registration.record_id, ("", False))
    if not run_id:
        return mlflow.logged(mlflow.open_experiment(registration))
    mlflow.take_up(run_id)
    return mlflow.logged(run_id)


def close_runs(opened: Sequence[Opened], measured: Sequence[Record], call: Call) -> list[tuple[Report, list[Path]]]:
    """Report on every experiment of a call, and log that to its run.

    Args:
        opened: As `open_runs` gave them.
        measured: The records of the call.
        call: MLflow, while it answers.

    Returns:
        Each report with its files, which lie beside the registration.
    """
    known = (call.tracked(lambda mlflow: mlflow.known()) or {}) if opened else {}
    run_ids = {record_id: run_id for record_id, (run_id, _) in known.items()}
    return [_close(one, measured, run_ids, call) for one in opened]


def _close(
    one: Opened, measured: Sequence[Record], run_ids: Mapping[str, str], call: Call
) -> tuple[Report, list[Path]]:
    own = [record for record in measured if record.experiment == one.registration.experiment.name]
    folder = one.file.parent.parent  # of the records
    observations = [
        Observation(
            record, run_ids.get(record.record_id, ""), traced=records.trace_path(record.file(folder)).exists()
        )
        for record in own
    ]
    logged = one.logged
    known = {one.registration.record_id: logged} if logged else {}
    report = build(one.registration.experiment, observations, [one.registration], logged=known)
    files = write(report, one.file.with_suffix(""))
    if logged:
        call.tracked(lambda mlflow: mlflow.close_experiment(logged.run_id, report.verdict_lines, files))
    return report, files

"""One cell: send it to a worker, wait without stirring, keep its record, log it."""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import faults, hardware, metrics
from registry import record as records
from registry.child import ask
from registry.device_lock import alone_on
from registry.outcome import Outcome, Refused
from registry.record import Record
from registry.redact import Redactor, environment_secrets, known_secrets
from registry.schema import what_is_measured
from registry.shown import artifacts

if TYPE_CHECKING:
    from registry.call import Call
    from registry.plan import Cell

REASON_LIMIT = 1000  # characters; the log beside the record has the rest
MAKE_ROOM = "Make room there; the same call with resume=true then goes on"


def run_cell(cell: Cell, index: int, session: int, call: Call) -> Record:
    """Measure a cell and keep its record; never raises for what happens inside the cell.

    Args:
        cell: Planned; one with a refusal gets its record without a worker.
        index: Its place in the sweep.
        session: In which of the sweep's sessions it is measured.
        call: What it shares with the others.
    """
    started, clock = faults.now(), time.monotonic()
    folder = Path(cell.config.records)
    hidden = Redactor(environment_secrets(os.environ) | known_secrets(dataclasses.asdict(cell.config)))
    record = Record(
        record_id=uuid.uuid4().hex,
        cell_id=cell.cell_id,
        sweep_id=call.sweep_id,
        index=index,
        outcome=Outcome.CRASH,
        label=cell.label,
        started_at=started.isoformat(timespec="milliseconds"),
        wall_s=0.0,
        config=hidden.plain(what_is_measured(cell.config)),
        environment={
            "device": hardware.describe(cell.device),
            "versions": cell.versions,
            "variables": cell.variables,
            "git": hardware.collect_git(),
            "tags": cell.tags,
        },
        kind=cell.config.protocol.measures,
        experiment=cell.experiment,
        session=session,
        attempt=records.next_attempt(folder, cell.cell_id, call.sweep_id, index),
        registration=call.registrations.get(cell.experiment, ""),
    )
    file = record.file(folder)
    known = {"cell_id": cell.cell_id, "sweep_id": call.sweep_id, "gpu_name": cell.device.name}
    run_id = call.tracked(
        lambda mlflow: mlflow.open(record.record_id, cell.label, record.config, known, record.started_at)
    )
    answer: dict[str, Any]
    if call.interrupted:
        answer = {"outcome": Outcome.INTERRUPTED, "reason": "the sweep was interrupted before this cell"}
    elif cell.refusal:
        answer = dataclasses.asdict(cell.refusal)
    else:
        answer = _measured(cell, file, call, hidden)
    record.outcome = Outcome(answer.pop("outcome"))
    record.reason, record.remedy = (answer.pop(key, "") for key in ("reason", "remedy"))
    doubts = answer.pop("warnings", [])
    if record.outcome is Outcome.OK:
        record = _filled(record, cell, answer)
    record.warnings = [*record.warnings, *doubts]
    record.wall_s = round(time.monotonic() - clock, 3)
    clean = Record(**hidden.plain(vars(record)))
    clean.reason, clean.remedy = _sentence(clean.reason), _sentence(clean.remedy)  # a secret is found whole, then cut
    record = _kept(clean, folder)
    call.interrupted |= record is not clean or record.outcome is Outcome.INTERRUPTED
    if run_id:
        call.tracked(lambda mlflow: mlflow.close(run_id, record, artifacts(file)))
    return record


def _kept(record: Record, folder: Path) -> Record:
    """Write the record and return it; where it cannot be written, one without figures that says so.

    A measurement without a record is none: nothing may stand in MLflow that no file proves.
    """
    try:
        records.write(record, folder)
    except OSError as error:
        if record.outcome is Outcome.INTERRUPTED:
            return record
        reason = f"its record cannot be written: {error}"
        return dataclasses.replace(
            record, outcome=Outcome.CRASH, reason=_sentence(reason), remedy=MAKE_ROOM, metrics={}, step_times_ms=[],
            event_times_ms=None, call_times_us=[], event_call_times_us=None, measured={}, study={}, warnings=[],
        )  # fmt: skip
    return record


def _sentence(text: str) -> str:
    """`text` as MLflow and a terminal take it: of bounded length, lone surrogates (of file names) spelt out."""
    encodable = text.encode(errors="backslashreplace").decode()
    return encodable if len(encodable) <= REASON_LIMIT else f"{encodable[:REASON_LIMIT]}..."


def _filled(record: Record, cell: Cell, measured: dict[str, Any]) -> Record:
    """The record with its figures; a crash where a plugin told something that none can be made of."""
    filled = dataclasses.replace(record)
    try:
        fill(filled, cell, measured)
        return records.from_plain(filled.plain())
    except Exception as error:  # no answer of a plugin may cost the other cells theirs
        reason = f"what the worker answered makes no record: {type(error).__name__}: {error}"
        return dataclasses.replace(record, outcome=Outcome.CRASH, reason=reason)


def fill(record: Record, cell: Cell, measured: dict[str, Any]) -> None:
    """Derive everything that a measured cell's record holds."""
    record.environment["torch"] = measured.pop("torch")
    if cell.kernel_alone:
        record.metrics = metrics.kernel_metrics(cell, measured)
        record.warnings = metrics.kernel_warnings(measured, record.environment["torch"].get("l2_bytes"))
        record.call_times_us = measured.pop("call_times_us")
        record.event_call_times_us = measured.pop("event_call_times_us")
        record.measured = measured
        return
    record.metrics = metrics.metrics(cell, measured)
    peak = cell.config.gpu.peak_bandwidth_gbs or measured["read_bandwidth_gbs"]
    record.study = metrics.study_keys(cell, peak, record.metrics["median_tpot_ms"])
    record.warnings = metrics.warnings(cell, measured, record.metrics)
    record.step_times_ms = measured.pop("step_times_ms")
    record.event_times_ms = measured.pop("event_times_ms")
    record.measured = measured


def _measured(cell: Cell, file: Path, call: Call, hidden: Redactor) -> dict[str, Any]:
    """What a worker says of a cell, which has the device to itself."""
    try:
        with ExitStack() as stack:
            with call.listen():
                held = stack.enter_context(alone_on(cell.device, cell.config.on_busy, call.stage))
            return ask(cell, file, call, hidden, () if held is None else (held,))
    except KeyboardInterrupt:
        return {"outcome": Outcome.INTERRUPTED, "reason": "interrupted by the user"}
    except Refused as refused:
        return dataclasses.asdict(refused.refusal)
    except OSError as error:  # no room, no process, no permission
        return {"outcome": Outcome.CRASH, "reason": f"no worker could be started: {error}"}

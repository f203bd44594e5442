"""One cell: send it to a worker, wait without stirring, keep its record, log it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from registry import hardware, logs, metrics
from registry import record as records
from registry.cache import kernel_environment
from registry.environments import ROOT, interpreter
from registry.outcome import Outcome
from registry.record import Record
from registry.redact import Redactor, environment_secrets, known_secrets
from registry.schema import what_is_measured
from registry.shown import artifacts
from registry.worker import STAGES_FD, Request, to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from registry.call import Call
    from registry.plan import Cell

REASON_LIMIT = 1000  # characters; the log beside the record has the rest
LAST_BYTES = 1 << 20  # of a log, in which a dead worker's last words are looked for
FORCED_ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # NVML's order: device 0 is the same to both
CHILD_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}


def run_cell(cell: Cell, index: int, session: int, call: Call) -> Record:
    """Measure a cell and keep its record; never raises for what happens inside the cell.

    Args:
        cell: Planned; one with a refusal gets its record without a worker.
        index: Its place in the sweep.
        session: In which of the sweep's sessions it is measured.
        call: What it shares with the others.
    """
    started, clock = datetime.now(UTC), time.monotonic()
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
            "git": hardware.collect_git(),
            "tags": cell.tags,
        },
        kind=cell.config.protocol.measures,
        experiment=cell.experiment,
        session=session,
        attempt=records.next_attempt(folder, cell.cell_id, call.sweep_id, index),
        registration=call.registrations.get(cell.experiment, ""),
    )
    file = records.path(folder, cell.cell_id, call.sweep_id, index, record.attempt)
    known = {"cell_id": cell.cell_id, "sweep_id": call.sweep_id, "gpu_name": cell.device.name}
    run_id = call.tracked(lambda mlflow: mlflow.open(record.record_id, cell.label, record.config, known))
    if call.interrupted:
        answer = {"outcome": Outcome.INTERRUPTED, "reason": "the sweep was interrupted before this cell"}
    elif cell.refusal:
        answer = dataclasses.asdict(cell.refusal)
    else:
        answer = _ask_worker(cell, file, call, hidden)
    record.outcome = Outcome(answer.pop("outcome"))
    record.reason, record.remedy = (_sentence(answer.pop(key, "")) for key in ("reason", "remedy"))
    if record.outcome is Outcome.OK:
        record = _filled(record, cell, answer)
    record.wall_s = round(time.monotonic() - clock, 3)
    record = Record(**hidden.plain(vars(record)))
    records.write(record, folder)
    call.interrupted |= record.outcome is Outcome.INTERRUPTED
    if run_id:
        call.tracked(lambda mlflow: mlflow.close(run_id, record, artifacts(file)))
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
        return dataclasses.replace(record, outcome=Outcome.CRASH, reason=_sentence(reason))


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


def _ask_worker(cell: Cell, file: Path, call: Call, hidden: Redactor) -> dict[str, Any]:
    """Run the child process and take its answer, or make one out of how it ended; its log lies beside the record.

    What is asked may hold secrets and has no name on disk; what is answered holds none.
    """
    log = file.with_suffix(".log")
    with tempfile.TemporaryDirectory(prefix="rfloor-") as folder:
        answer, trace = Path(folder, "answer.json"), Path(folder, "trace.json.gz")
        request = Request(cell.config, cell.device.kind, cell.targets, cell.mean_context, str(trace))
        try:
            with logs.opened(log, hidden) as output, tempfile.TemporaryFile() as question:
                question.write(to_json(request).encode())
                question.seek(0)
                returncode = _run_worker(cell, question, answer, output, call, hidden)
        except KeyboardInterrupt:
            return {"outcome": Outcome.INTERRUPTED, "reason": "interrupted by the user"}
        if returncode is None:
            return {
                "outcome": Outcome.TIMEOUT,
                "reason": f"not done after {cell.config.protocol.timeout_s:g} s",
                "remedy": "Give protocol.timeout_s=... more seconds",
            }
        if answer.exists():
            content: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            if trace.exists():
                with contextlib.suppress(OSError):  # a trace for which there is no room costs no figures
                    shutil.move(trace, records.trace_path(file))
            return content
        return _died(returncode, log)


def _run_worker(
    cell: Cell, question: IO[bytes], answer: Path, output: IO[bytes], call: Call, hidden: Redactor
) -> int | None:
    """The child's exit code, or `None` once its time is over; neither it nor what it started is left.

    Raises:
        KeyboardInterrupt: The user wants no more.
    """
    read_end, write_end = os.pipe()
    try:
        child = subprocess.Popen(
            [_interpreter(cell), "-m", "registry.worker", str(answer)],
            stdin=question,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            start_new_session=True,
            env=_environment(cell) | {STAGES_FD: str(write_end)},
        )
    finally:
        os.close(write_end)
    try:
        with call.listen():
            finished = _wait(
                child, read_end, cell.config.protocol.timeout_s, lambda name: call.stage(hidden.text(name))
            )
    finally:
        os.close(read_end)
        _kill(child)
    return child.returncode if finished else None


def _environment(cell: Cell) -> dict[str, str]:
    """A worker's environment: what rfloor suggests, over it the user's, over that what has to be."""
    found = (
        CHILD_ENVIRONMENT
        | kernel_environment(cell.config.cache, cell.versions)
        | dict(os.environ)
        | FORCED_ENVIRONMENT
    )
    beside = str(Path(_interpreter(cell)).parent)  # where pip puts ninja, by which kernels are compiled
    found["PATH"] = os.pathsep.join(filter(None, [beside, found.get("PATH")]))
    return found | {"PYTHONPATH": str(ROOT)} if cell.environment else found  # of ours its interpreter sees the code


def _interpreter(cell: Cell) -> str:
    return str(interpreter(cell.environment)) if cell.environment else sys.executable


def _wait(child: subprocess.Popen[bytes], stages: int, timeout_s: float, stage: Callable[[str], None]) -> bool:
    """Sleep until the child ends, passing on what it begins; false once the time is over.

    The parent sleeps in poll(2) and wakes for the child's own messages alone, of which there is none
    inside a timed window.
    """
    deadline = time.monotonic() + timeout_s
    process = os.pidfd_open(child.pid)
    poller = select.poll()
    poller.register(process, select.POLLIN)
    poller.register(stages, select.POLLIN)
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for descriptor, _ in poller.poll(left * 1000):
                if descriptor == process:
                    child.wait()
                    return True
                told = os.read(stages, 4096).decode(errors="replace")
                if not told:
                    poller.unregister(stages)
                for name in told.splitlines():
                    stage(name)
    finally:
        os.close(process)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group, whether or not it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _died(returncode: int, log: Path) -> dict[str, Any]:
    """What a child that left no answer died of."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LAST_BYTES))
        text = stream.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = f"; its last words: {lines[-1][:300]}" if lines else ""
    if "Fatal Python error" in text:  # faulthandler's dump: its first frame says more than its last line
        frames = (line.strip() for line in text.rpartition("Fatal Python error")[2].splitlines())
        last = next((f"; it was in {frame}" for frame in frames if frame.startswith("File ")), last)
    if returncode >= 0:
        return {
            "outcome": Outcome.CRASH,
            "reason": f"the worker ended with code {returncode} and no answer{last}",
        }
    name = signal.Signals(-returncode).name
    hint = " (the kernel's way when memory runs out: see dmesg)" if name == "SIGKILL" else ""
    return {
        "outcome": Outcome.CRASH,
        "reason": f"the worker was killed by {name}{hint}{last}",
        "remedy": f"See {log}",
    }

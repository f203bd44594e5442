"""The child process that measures one cell: started, waited for without stirring, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from registry import inotify, keeper, logs, private, traces
from registry import record as records
from registry.cache import kernel_environment
from registry.environments import ROOT, import_path, interpreter
from registry.log_limit import LogLimit
from registry.outcome import Outcome
from registry.worker import PARENT, STAGES_FD, UNWRITTEN, Request, to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from registry.call import Call
    from registry.plan import Cell
    from registry.redact import Redactor

VMSTAT = Path("/proc/vmstat")
WORKER = ("-m", "registry.worker")
KEEPER = (sys.executable, "-I", "-S", keeper.__file__)
GRACE_S = 10.0
"""Within which a worker ends that has answered: it gives back a device's memory, and ends a compiler's processes."""
LINGERED = "the worker did not end by itself once it had answered, and was killed"
CODE_BYTES = 16
"""More than an exit code has digits."""
LAST_BYTES = 1 << 20  # of a log, in which a dead worker's last words are looked for
FORCED_ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # NVML's order: device 0 is the same to both
CHILD_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}


def ask(cell: Cell, file: Path, call: Call, hidden: Redactor, inherited: tuple[int, ...]) -> dict[str, Any]:
    """Run the child process and take its answer, or make one out of how it ended.

    Its log and the trace of its profiled steps lie beside the record, clean.
    What is asked may hold secrets and has no name on disk; what is answered holds none.

    Args:
        cell: Planned.
        file: Where its record will lie.
        call: Told what the child begins; its interrupt ends the wait.
        hidden: Knows the cell's secrets.
        inherited: Descriptors that the child is to hold too.

    Raises:
        KeyboardInterrupt: The user wants no more.
        OSError: There is no room for the log, no process to be had, or a cache that others write into.
    """
    private.made(Path(cell.config.cache.folder).expanduser().absolute())
    log = file.with_suffix(".log")
    with tempfile.TemporaryDirectory(prefix="rfloor-") as folder:
        answer, trace = Path(folder, "answer.json"), Path(folder, "trace.json.gz")
        request = Request(cell.config, cell.device.kind, cell.targets, cell.mean_context, str(trace))
        killed = _oom_kills()
        with logs.opened(log, hidden) as output, tempfile.TemporaryFile() as question:
            question.write(to_json(request).encode())
            question.seek(0)
            returncode = _run_worker(cell, question, answer, output, call, hidden, inherited)
        if answer.exists():
            content: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            content["warnings"] = [LINGERED] if returncode is None else []
            if trace.exists():
                cleaned = Path(folder, "cleaned.json.gz")
                with contextlib.suppress(OSError):  # a trace for which there is no room costs no figures
                    if traces.clean(trace, cleaned, hidden):
                        shutil.move(cleaned, records.trace_path(file))
            return content
        if returncode is None:
            return {
                "outcome": Outcome.TIMEOUT,
                "reason": f"not done after {cell.config.protocol.timeout_s:g} s",
                "remedy": "Give protocol.timeout_s=... more seconds",
            }
        return _died(returncode, log, _oom_kills() > killed)


def _run_worker(
    cell: Cell,
    question: IO[bytes],
    answer: Path,
    output: BinaryIO,
    call: Call,
    hidden: Redactor,
    inherited: tuple[int, ...],
) -> int | None:
    """The child's exit code, or `None` if it had to be ended; neither it nor what it started is left.

    Raises:
        KeyboardInterrupt: The user wants no more.
    """
    mark = uuid.uuid4().hex
    line, its_end = socket.socketpair()
    with line, LogLimit(output) as limit:
        read_end, write_end = os.pipe()
        try:
            keeping = subprocess.Popen(
                [*KEEPER, mark, str(its_end.fileno()), PARENT, _interpreter(cell), *WORKER, str(answer)],
                stdin=question,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(its_end.fileno(), write_end, *inherited),
                start_new_session=True,
                env=_environment(cell) | {STAGES_FD: str(write_end), keeper.MARK: mark},
            )
        finally:
            its_end.close()
            os.close(write_end)
        try:
            with call.listen():
                time_s = cell.config.protocol.timeout_s
                finished = _wait(line, read_end, answer, limit, time_s, lambda name: call.stage(hidden.text(name)))
            told = line.recv(CODE_BYTES) if finished else b""
        finally:
            os.close(read_end)
            line.close()  # at which the keeper kills who is left
            keeping.wait()
            keeper.kill_marked(mark)  # had it been killed itself
    if not finished:
        return None
    return int(told) if told else keeping.returncode


def _environment(cell: Cell) -> dict[str, str]:
    """A worker's environment: what rfloor suggests, over it the user's, over that what has to be."""
    found = (
        CHILD_ENVIRONMENT
        | kernel_environment(cell.config.cache, cell.versions)
        | dict(os.environ)
        | FORCED_ENVIRONMENT
        | import_path()
    )
    beside = str(Path(_interpreter(cell)).parent)  # where pip puts ninja, by which kernels are compiled
    found["PATH"] = os.pathsep.join(filter(None, [beside, found.get("PATH")]))
    return found | {"PYTHONPATH": str(ROOT)} if cell.environment else found  # of ours its interpreter sees the code


def _interpreter(cell: Cell) -> str:
    return str(interpreter(cell.environment)) if cell.environment else sys.executable


def _wait(
    line: socket.socket,
    stages: int,
    answer: Path,
    limit: LogLimit,
    timeout_s: float,
    stage: Callable[[str], None],
) -> bool:
    """Sleep until the child has ended, passing on what it begins; false once its time is over.

    That is soon once its answer lies there, which is renamed into place and so is whole.
    The parent sleeps in poll(2) and wakes at the keeper's word, for the child's own messages, of which there is none
    inside a timed window, and for what it prints.
    """
    deadline = time.monotonic() + timeout_s
    answered = inotify.watch(str(answer.parent), inotify.IN_MOVED_TO)
    poller = select.poll()
    for descriptor in (line.fileno(), stages, limit.written, answered):
        if descriptor >= 0:
            poller.register(descriptor, select.POLLIN)
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for descriptor, _ in poller.poll(left * 1000):
                if descriptor == line.fileno():
                    return True
                if descriptor == limit.written:
                    limit.look()
                elif descriptor == answered:
                    inotify.take(answered)
                    deadline = time.monotonic() + GRACE_S if answer.exists() else deadline
                elif not _pass_on(stages, stage):
                    poller.unregister(stages)
    finally:
        if answered >= 0:
            os.close(answered)


def _pass_on(stages: int, stage: Callable[[str], None]) -> bool:
    """Pass on what a child tells that it begins; false once it tells no more."""
    told = os.read(stages, 4096).decode(errors="replace")
    for name in told.splitlines():
        stage(name)
    return bool(told)


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; of a container's, its host's."""
    with contextlib.suppress(OSError):
        for line in VMSTAT.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _died(returncode: int, log: Path, for_memory: bool) -> dict[str, Any]:
    """What a child that left no answer died of.

    Args:
        returncode: The child's.
        log: Its.
        for_memory: Whether the kernel killed a process for want of memory meanwhile.
    """
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LAST_BYTES))
        text = stream.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = f"; its last words: {lines[-1][:300]}" if lines else ""
    if "Fatal Python error" in text:  # faulthandler's dump: its first frame says more than its last line
        frames = (line.strip() for line in text.rpartition("Fatal Python error")[2].splitlines())
        last = next((f"; it was in {frame}" for frame in frames if frame.startswith("File ")), last)
    if returncode == UNWRITTEN:
        return {
            "outcome": Outcome.CRASH,
            "reason": f"what the worker found could not be written{last}",
            "remedy": f"Make room in {tempfile.gettempdir()}, or set TMPDIR to a folder that has it",
        }
    if returncode >= 0:
        return {
            "outcome": Outcome.CRASH,
            "reason": f"the worker ended with code {returncode} and no answer{last}",
            "remedy": f"See {log}",
        }
    name = signal.Signals(-returncode).name
    if name == "SIGKILL" and for_memory:
        return {
            "outcome": Outcome.OOM,
            "reason": "the kernel killed the worker for want of host memory",
            "remedy": "Use a smaller model or context, or a machine or container with more memory",
        }
    hint = " (the kernel's way when memory runs out: see dmesg)" if name == "SIGKILL" else ""
    return {
        "outcome": Outcome.CRASH,
        "reason": f"the worker was killed by {name}{hint}{last}",
        "remedy": f"See {log}",
    }

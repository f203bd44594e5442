"""The cell record: one JSON file a cell and session, the truth of which MLflow is a projection."""

from __future__ import annotations

import json
import math
import os
import secrets
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from registry import faults, files
from registry.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA_VERSION = 1
STUDY_KEYS = (
    "arch",
    "gpu",
    "ctx",
    "p50_ms",
    "weight_bytes",
    "bytes_per_token_kv",
    "avg_ctx_during_measure",
    "kv_bytes_avg",
    "bw_peak_gbs",
    "t_floor_ms",
    "R_floor",
    "n_layers",
    "source",
)
"""Keys of the study's own cell files; they stand at the top level of a record, beside rfloor's."""
HEAD_BYTES = 1024
"""Within which a record's head lies."""
OUTCOMES = tuple(Outcome)


class BadRecord(Exception):
    """A file that is no cell record, or one of a schema that this version cannot read."""


class What(NamedTuple):
    """What a record answers; what it is recognised by when its sweep is taken up again.

    Attributes:
        cell_id: The identity of what is measured (`registry.identity`).
        session: Of how many times a sweep measures the cell this is which, from 0.
        experiment: Name of the experiment that it is measured for; empty for none.
    """

    cell_id: str
    session: int
    experiment: str


@dataclass(kw_only=True)
class Head:
    """What stands first in a record's file, so that thousands can be told apart by their beginnings (`head`).

    Attributes:
        record_id: Unique; what an import recognises a record by.
        cell_id: See `What`.
        sweep_id: The call that it belongs to.
        index: Its place in that sweep, from 0.
        session: See `What`.
        attempt: Of how often the sweep tried the session this is which, from 1: a resumed sweep tries again.
        kind: `step` for a whole decode step, `attention` for a kernel alone: what was timed.
        experiment: See `What`.
        outcome: How it ended.
        label: The cell in one line.
        started_at: UTC, ISO 8601.
        wall_s: Seconds from planning to the end, loading and waiting for the device included.
    """

    record_id: str
    cell_id: str
    sweep_id: str
    index: int
    session: int = 0
    attempt: int = 1
    kind: str = "step"
    experiment: str = ""
    outcome: Outcome
    label: str
    started_at: str
    wall_s: float

    @property
    def what(self) -> What:
        """What it answers."""
        return What(self.cell_id, self.session, self.experiment)

    def file(self, folder: Path) -> Path:
        """Where it lies under the folder of records."""
        return path(folder, self.cell_id, self.sweep_id, self.index, self.attempt)


@dataclass(kw_only=True)
class Record(Head):
    """What is known of one cell after one session.

    Attributes:
        registration: SHA-256 of what was registered of that experiment before its first cell ran; empty for none.
        reason: Why it ended so, empty for ok.
        remedy: What would mend it, may be empty.
        warnings: What weakens the figures.
        config: The resolved configuration.
        environment: Device, driver, versions, commit.
        step_times_ms: Wall clock of each measured step.
        event_times_ms: Device events of each step of the last pass; `None` on the CPU.
        call_times_us: Wall clock of each measured call of a kernel alone.
        event_call_times_us: Device events of the same.
        metrics: Everything derived (`registry.metrics`).
        measured: The rest of the worker's answer: fidelity, execution, clocks before and after.
        study: The study's own keys.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    registration: str = ""
    reason: str = ""
    remedy: str = ""
    warnings: list[str] = field(default_factory=list)
    step_times_ms: list[float] = field(default_factory=list)
    event_times_ms: list[float] | None = None
    call_times_us: list[float] = field(default_factory=list)
    event_call_times_us: list[float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The record as its file holds it."""
        content = asdict(self)
        head = {name: content.pop(name) for name in _names(Head)}
        return {"schema_version": SCHEMA_VERSION, **head, **content.pop("study"), **content}


Types = type | tuple[type, ...]
TYPES: dict[str, Types] = {
    "record_id": str,
    "cell_id": str,
    "sweep_id": str,
    "index": int,
    "outcome": str,
    "label": str,
    "started_at": str,
    "wall_s": (int, float),
    "config": dict,
    "environment": dict,
    "reason": str,
    "remedy": str,
    "warnings": list,
    "step_times_ms": list,
    "event_times_ms": (list, type(None)),
    "metrics": dict,
    "measured": dict,
}
LATER: dict[str, Types] = {
    "kind": str,
    "experiment": str,
    "session": int,
    "attempt": int,
    "registration": str,
    "call_times_us": list,
    "event_call_times_us": (list, type(None)),
}
"""What records have had since there are experiments; those before are of steps, for none, and of one session."""
TIMED = {"step": "step_times_ms", "attention": "call_times_us"}
"""What each kind of record has when its outcome is ok."""


def read(file: Path) -> Record:
    """Read and check a record.

    Raises:
        BadRecord: The file cannot be read, is no JSON object, or lacks what a record has.
    """
    try:
        return from_plain(read_json(file))
    except BadRecord as error:
        raise BadRecord(f"{file}: {error}") from error


def head(file: Path) -> Head:
    """What a record's file says of itself before its figures, at a tenth of the time that `read` takes.

    Raises:
        BadRecord: See `read`; of a file that is whole only the beginning is taken apart.
    """
    try:
        data = files.read_bytes(file)
        if len(data) >= HEAD_BYTES and _is_whole(data):
            content = json.loads(data[: data.rfind(b',\n "', 0, HEAD_BYTES)] + b"}")
            if isinstance(content, dict):
                _check(content, _head_types(), {})
                own = {name: content[name] for name in _names(Head)}
                return Head(**{**own, "outcome": Outcome(own["outcome"])})
    except (OSError, ValueError, BadRecord):  # of an earlier version, which has another order, or no record at all
        pass
    found = read(file)
    return Head(**{name: getattr(found, name) for name in _names(Head)})


def _is_whole(data: bytes) -> bool:
    """Whether a file has its end and no bytes that `write_json` never writes: zeros are a block that a crash lost."""
    return data.endswith(b"}\n") and b"\0" not in data and data.isascii()


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BadRecord: It cannot be read or is no JSON.
    """
    try:
        return json.loads(files.read_text(file), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise BadRecord("nested too deeply") from error
    except (OSError, ValueError) as error:
        raise BadRecord(str(error)) from error


def from_plain(content: Any) -> Record:
    """Check a record's plain form.

    Raises:
        BadRecord: See `read`.
    """
    if not isinstance(content, dict):
        raise BadRecord("no JSON object")
    _check(content, TYPES, LATER)
    kind_of = content.get("kind", "step")
    series = ("step_times_ms", "event_times_ms", "call_times_us", "event_call_times_us")
    times = [time for name in series for time in content.get(name) or []]
    if not all(_is_number(v) for v in [content["wall_s"], *times, *content["metrics"].values()]):
        raise BadRecord("a time or a metric is no finite number")
    if not all(isinstance(warning, str) for warning in content["warnings"]):
        raise BadRecord("a warning is no text")
    for name in ("device", "versions", "git", "tags"):
        if not isinstance(content["environment"].get(name, {}), dict):
            raise BadRecord(f"environment.{name} is a {type(content['environment'][name]).__name__}")
    if content["outcome"] == Outcome.OK and not content.get(TIMED[kind_of]):
        raise BadRecord(f"the outcome is ok and there are no {TIMED[kind_of]}")
    known = {*_names(Record)} - {"study"}
    values = {name: value for name, value in content.items() if name in known}
    values["outcome"] = Outcome(values["outcome"])
    return Record(**values, study={key: content[key] for key in STUDY_KEYS if key in content})


@cache
def _names(kind: type[Head]) -> tuple[str, ...]:
    """The names of its fields, in order."""
    return tuple(f.name for f in fields(kind))


@cache
def _head_types() -> dict[str, Types]:
    types = TYPES | LATER
    return {name: types[name] for name in _names(Head)}


def _check(content: dict[str, Any], needed: Mapping[str, Types], known: Mapping[str, Types]) -> None:
    """Refuse what no record says of itself.

    Args:
        content: A record's plain form, or its head.
        needed: What has to be there, with its types.
        known: The types of what may be there.

    Raises:
        BadRecord: Something is missing, or is not what it should be.
    """
    version = content.get("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        raise BadRecord(f"schema version {version!r}, this rfloor reads {SCHEMA_VERSION}")
    for name, kind in {**needed, **known}.items():
        if name not in content and name in needed:
            raise BadRecord(f"no {name}")
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            raise BadRecord(f"{name} is a {type(content[name]).__name__}")
    if content["outcome"] not in OUTCOMES:
        raise BadRecord(f"an outcome is one of {', '.join(Outcome)}, not {content['outcome']!r}")
    if not _is_time(content["started_at"]):
        raise BadRecord(f"started_at is no ISO 8601 time with a zone: {content['started_at']!r}")
    if (kind_of := content.get("kind", "step")) not in TIMED:
        raise BadRecord(f"a record's kind is one of {', '.join(TIMED)}, not {kind_of!r}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    """A number of a JSON file: what a float cannot hold could be read and never be written again."""
    found = float(text)
    if math.isinf(found):
        raise ValueError(f"{text[:20]} is no finite number")
    return found


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def write(record: Record, folder: Path) -> Path:
    """Write a record under `folder` and return its file; a reader never sees half of it."""
    file = record.file(folder)
    faults.disk(faults.RECORD_FULL)
    write_json(file, record.plain())
    return file


def path(folder: Path, cell_id: str, sweep_id: str, index: int, attempt: int = 1) -> Path:
    """Where a cell's record of one session lies; its log lies beside it with another suffix."""
    again = f"-{attempt}" if attempt > 1 else ""
    return folder / cell_id / f"{sweep_id}-{index}{again}.json"


def next_attempt(folder: Path, cell_id: str, sweep_id: str, index: int) -> int:
    """The number of the first attempt of which there is neither a record nor the log of a killed worker."""
    attempt = 1
    while (file := path(folder, cell_id, sweep_id, index, attempt)).exists() or file.with_suffix(".log").exists():
        attempt += 1
    return attempt


def trace_path(file: Path) -> Path:
    """Where the trace of a record's profiled steps lies, given where the record does."""
    return file.with_suffix(".trace.json.gz")


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically: a temporary file in the same folder, flushed to disk, renamed into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

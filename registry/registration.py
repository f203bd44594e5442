"""What was fixed before an experiment's first cell ran: a file beside the records, and a run of its own in MLflow.

It holds the question, the thresholds, the cells and their order, with a time and a hash. The verdict follows from it
and from the records alone. Each record has the hash of the registration under which it was measured, so that another
threshold cannot be put beneath them afterwards without changing every record too. Against who writes both anew no
hash helps, and MLflow takes a run's start from whoever opens it: the only witness then is the date that an artifact
store of somebody else's gave the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from registry import faults
from registry.experiments import applies
from registry.outcome import BadInput
from registry.record import BadRecord, read_json, write_json
from registry.redact import Redactor
from registry.schema import GROUPS, ExperimentConfig, from_plain
from registry.stats import CONFIDENCE, RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from registry.plan import Cell

KIND = "experiment"
SCHEMA_VERSION = 1
FOLDER = "experiments"
FIXED = ("arms", "baseline", "candidate", "claims")
"""What of an experiment decides its verdict."""
HASH_TAG = "registration.sha256"
"""The tag by which a run in MLflow, of the experiment or of one of its cells, tells under what it was measured."""
LOGGED_TAG = "registration.logged_at"
"""The tag by which an experiment's run tells when it was opened, UTC, ISO 8601."""
INTERVAL = f"Student's t, {CONFIDENCE:.0%}, of the mean over sessions of baseline / candidate median step time"


@dataclass
class Registration:
    """What was fixed beforehand.

    Attributes:
        record_id: Unique; what an import recognises it by.
        sweep_id: The call that the experiment's cells belong to.
        experiment: Its configuration: question, arms, thresholds, the study's figures.
        gpus: Spec bandwidth of each GPU profile among the cells, GB/s; `None` without a spec sheet.
        sessions: How often each cell is measured.
        seed: Of the cells' order (`registry.sessions`).
        cells: Session, identity and label of each cell, in the order in which they are to run.
        registered_at: UTC, ISO 8601.
        interval: What the verdict rests on.
        resamples: Of the bootstrap interval that is told beside it.
        sha256: Of all of the above, as canonical JSON.
    """

    record_id: str
    sweep_id: str
    experiment: ExperimentConfig
    gpus: dict[str, float | None]
    sessions: int
    seed: int
    cells: list[dict[str, Any]]
    registered_at: str
    interval: str = INTERVAL
    resamples: int = RESAMPLES
    sha256: str = ""

    def digest(self) -> str:
        """The hash of everything but the hash."""
        return _digest(dataclasses.asdict(self))

    def plain(self) -> dict[str, Any]:
        """The registration as its file holds it."""
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, **dataclasses.asdict(self)}

    def tags(self) -> dict[str, str]:
        """What its run in MLflow says beside the file itself."""
        claims = [
            claim.claim for claim in self.experiment.claims if any(applies(claim, gbs) for gbs in self.gpus.values())
        ]
        return {
            "kind": KIND,
            "experiment": self.experiment.name,
            "sweep_id": self.sweep_id,
            "gpu_name": ", ".join(self.gpus),
            HASH_TAG: self.sha256,
            "registration.time": self.registered_at,
            "registration.claims": "; ".join(claims) or "none for this GPU",
            "mlflow.note.content": self.experiment.question,
        }


@dataclass(frozen=True)
class Logged:
    """Where MLflow has a registration.

    Attributes:
        run_id: The experiment's own run.
        at: When that was opened; `None` where it does not say.
    """

    run_id: str
    at: datetime | None = None

    @classmethod
    def told(cls, run_id: str, tag: str) -> Logged:
        """As the run's tag has it, which anybody may have changed."""
        try:
            at = datetime.fromisoformat(tag)
        except ValueError:
            return cls(run_id)
        return cls(run_id, at if at.tzinfo else None)


def register(sweep_id: str, ordered: Sequence[tuple[int, Cell]], seed: int) -> list[Registration]:
    """One registration for each experiment among a call's cells.

    Args:
        sweep_id: Of the call.
        ordered: Session and cell, in the order in which they are to run.
        seed: Of that order.
    """
    now = faults.now().isoformat(timespec="milliseconds")
    names = dict.fromkeys(cell.config.experiment.name for _, cell in ordered if cell.config.experiment.cells)
    found = []
    for name in names:
        own = [(session, cell) for session, cell in ordered if cell.config.experiment.name == name]
        config = own[0][1].config
        registration = Registration(
            record_id=f"{sweep_id}-{name}",
            sweep_id=sweep_id,
            experiment=from_plain(ExperimentConfig, Redactor().plain(dataclasses.asdict(config.experiment))),
            gpus={cell.config.gpu.name: cell.config.gpu.peak_bandwidth_gbs for _, cell in own},
            sessions=config.protocol.sessions,
            seed=seed,
            cells=[{"session": session, "cell_id": cell.cell_id, "label": cell.label} for session, cell in own],
            registered_at=now,
        )
        registration.sha256 = registration.digest()
        found.append(registration)
    return found


def path(folder: Path, sweep_id: str, name: str) -> Path:
    """Where the registration of a sweep's experiment lies under the folder of records."""
    return folder / FOLDER / f"{sweep_id}-{name}.json"


def write(registration: Registration, folder: Path) -> Path:
    """Write a registration under the folder of records and return its file."""
    file = path(folder, registration.sweep_id, registration.experiment.name)
    write_json(file, registration.plain())
    return file


def first(registration: Registration, folder: Path) -> Registration:
    """What was fixed when the sweep first began, which stays; the registration itself if it begins now."""
    file = path(folder, registration.sweep_id, registration.experiment.name)
    return from_json(read_json(file)) if file.exists() else registration


def check_claims(sweep_id: str, experiment: ExperimentConfig, folder: Path) -> None:
    """Refuse to go on with an experiment under other thresholds than those with which it began.

    Raises:
        BadInput: They differ, or what was registered cannot be read.
    """
    file = path(folder, sweep_id, experiment.name)
    if not file.exists():
        return
    told = f"experiment={experiment.name} of {sweep_id}"
    try:
        began = from_json(read_json(file))
    except BadRecord as error:
        raise BadInput(f"{told}: {file} is no registration: {error}; leave out resume=true") from error
    if any(getattr(began.experiment, key) != getattr(experiment, key) for key in FIXED):
        raise BadInput(
            f"{told} was registered at {began.registered_at} with other arms or thresholds ({file}): leave out "
            "resume=true, and it is an experiment of its own"
        )


def from_json(content: Any) -> Registration:
    """A registration out of its file's content.

    Raises:
        BadRecord: It is of another schema, lacks something, or is not what was hashed.
    """
    plain = dict(content) if isinstance(content, dict) else {}
    if (version := plain.pop("schema_version", None)) != SCHEMA_VERSION:
        raise BadRecord(f"schema version {version!r} of a registration, this rfloor reads {SCHEMA_VERSION}")
    plain.pop("kind", None)
    try:
        found = from_plain(Registration, plain)
        _check(found)
        digest = _digest(plain)  # of what was written: a later version's registration may have more to say
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"no registration: {error}") from error
    if digest != found.sha256:
        raise BadRecord("a registration whose hash is not that of its content: it was changed after it was made")
    return found


def _check(one: Registration) -> None:
    """Refuse what no experiment could have been registered with.

    Raises:
        ValueError: There is some of it.
    """
    if datetime.fromisoformat(one.registered_at).tzinfo is None:
        raise ValueError(f"registered_at has no zone: {one.registered_at!r}")
    if one.experiment.arms is not None and one.experiment.arms not in GROUPS:
        raise ValueError(f"experiment.arms is {one.experiment.arms!r}")
    for cell in one.cells:
        if not isinstance(cell.get("session"), int) or not isinstance(cell.get("cell_id"), str):
            raise ValueError("one of its cells has no session or no cell_id")


def _digest(content: Mapping[str, Any]) -> str:
    hashed = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

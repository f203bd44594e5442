"""Records to MLflow after the fact: from machines without network, once a store is up again, or left by a sweep."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from registry import logs
from registry.archive import everything_in
from registry.environments import import_path
from registry.locks import locked
from registry.redact import known_secrets
from registry.registration import Registration
from registry.schema import TrackingConfig, from_plain
from registry.shown import artifacts
from registry.tracking import Tracker
from registry.worker import PARENT, die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from registry.record import Record

    Kept = tuple[Path, Record | Registration]

MANY = 100
"""Records that MLflow lacks from which on a second process helps: it takes seconds to begin, and MLflow takes one
processor for each."""


def import_records(folder: Path, config: TrackingConfig) -> tuple[Counter[str], list[str]]:
    """Log every record under `folder` that MLflow does not have yet; complete the runs that were cut off.

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
    if sum(not known.get(one.record_id, ("", False))[1] for _, one in everything) < MANY:
        return log_missing(everything, tracker, known), problems
    own, other = _halves(everything)
    with _helped(folder, config) as helper:
        counts = log_missing(own, tracker, known)
        told, _ = helper.communicate()
    # Whatever kept the helper from it, a store that is down or its own end, this process meets or makes good.
    return counts + (log_missing(other, tracker, known) if helper.returncode else Counter(json.loads(told))), problems


def log_missing(
    kept: Sequence[Kept], tracker: Tracker, known: dict[str, tuple[str, bool]] | None = None
) -> Counter[str]:
    """Log those of the records that MLflow does not have yet, and complete the runs that were cut off.

    Two that do so with the same files at once share the work: a record is held while it is logged (how far that
    reaches says `registry.locks.held`), and whoever holds it looks for its run first. Two that import copies of it in
    the same moment, from two folders or two machines, may both make a run.

    Args:
        kept: The records with their files.
        tracker: To where.
        known: What the tracker knows already, if it has been asked.

    Returns:
        How many were `imported`, `completed` and `present`.

    Raises:
        TrackingDown: MLflow cannot be reached.
    """
    known = {**(tracker.known() if known is None else known)}
    counts: Counter[str] = Counter()
    for file, found in kept:
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
                run_id = _log(tracker, found, run_id, file)
        known[found.record_id] = (run_id, True)
    return counts


def _log(tracker: Tracker, found: Record | Registration, run_id: str, file: Path) -> str:
    """Log what MLflow lacks of a record or a registration; its run's id."""
    if isinstance(found, Registration):
        run_id = run_id or tracker.open_experiment(found)
        tracker.complete_experiment(run_id, file)
        return run_id
    tracker.keep_secret(known_secrets(found.config))
    if run_id:
        tracker.take_up(run_id)
    else:
        run_id = tracker.open(found.record_id, found.label, {}, {}, found.started_at)
    tracker.close(run_id, found, artifacts(file), late=True)
    return run_id


def _halves(kept: Sequence[Kept]) -> tuple[list[Kept], list[Kept]]:
    """The records as two processes share them: those of one name, which may lie in two places, are one's."""
    halves: tuple[list[Kept], list[Kept]] = ([], [])
    for one in kept:
        halves[crc32(one[1].record_id.encode(errors="replace")) % 2].append(one)
    return halves


@contextlib.contextmanager
def _helped(folder: Path, config: TrackingConfig) -> Iterator[subprocess.Popen[str]]:
    """A process that imports the second half, and that goes with this one; what it is told may hold secrets."""
    with subprocess.Popen(
        [sys.executable, "-m", "registry.importing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | import_path() | {PARENT: str(os.getpid())},
    ) as helper:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which its exit code says
                print(json.dumps([str(folder), dataclasses.asdict(config)]), file=helper.stdin, flush=True)
            yield helper
        finally:
            helper.kill()


def main() -> None:
    """Import the second half of a folder: what `_helped` tells is a line of JSON, and so is the answer."""
    die_with_parent()
    folder, config = json.loads(sys.stdin.readline())
    everything, _ = everything_in(Path(folder))
    json.dump(log_missing(_halves(everything)[1], Tracker(from_plain(TrackingConfig, config))), sys.stdout)


if __name__ == "__main__":
    main()

"""What was claimed beforehand, and what the sessions that were registered with it say of that."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

from registry.experiments import applies, matches
from registry.outcome import Outcome
from registry.registration import INTERVAL
from registry.report.labels import counted
from registry.report.observation import pairs
from registry.report.paired import judged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.registration import Logged, Registration
    from registry.report.observation import Observation
    from registry.schema import ClaimConfig, ExperimentConfig

NOT_REGISTERED = "no verdict: no registration of thresholds from before these runs was found"
NOT_CLAIMED = "no verdict: no threshold was registered for this GPU and these cells"


def verdicts(
    observations: Sequence[Observation],
    registrations: Sequence[Registration],
    today: ExperimentConfig,
    logged: Mapping[str, Logged],
) -> dict[str, list[str]]:
    """What is said of each registration's claims, by its record; each over the runs of its own sweep alone.

    Arms, thresholds and cells are those that were registered, whatever the configuration says today.

    Args:
        observations: Runs, of other sweeps too.
        registrations: What was fixed before those of each sweep.
        today: The experiment as it is configured now.
        logged: Where MLflow has the registrations, by their records.
    """
    claimed = [one for one in registrations if one.experiment.claims]
    if not claimed:
        return {"": [NOT_REGISTERED]} if today.claims else {}
    told = {}
    for one in sorted(claimed, key=lambda one: one.registered_at):
        lines = _of(one, observations)
        if one.experiment.claims != today.claims:
            lines.append("the configuration has other thresholds today; those that were registered decide")
        sweep = [run for run in observations if run.record.sweep_id == one.sweep_id]
        witness = _witness(logged.get(one.record_id), sweep)
        lines.append(f"registered {one.registered_at} {witness}; sha256 {one.sha256[:16]}, sweep {one.sweep_id}")
        told[one.record_id] = lines
    return told


def _witness(logged: Logged | None, sweep: Sequence[Observation]) -> str:
    """Whether a registration was in MLflow before the first of its sweep's cells began."""
    if logged is None:
        return "on disk only"
    if logged.at is None:
        return f"on disk; MLflow's run {logged.run_id} does not say when it was opened"
    if any(logged.at > datetime.fromisoformat(run.record.started_at) for run in sweep):
        opened = logged.at.isoformat(timespec="milliseconds")
        return f"on disk only; MLflow's run {logged.run_id} was opened {opened}, later than the first cell began"
    return f"on disk and in MLflow, run {logged.run_id}"


def _of(one: Registration, observations: Sequence[Observation]) -> list[str]:
    if one.interval != INTERVAL:
        return [f"no verdict: registered to be judged by {one.interval}, and this version judges by {INTERVAL}"]
    sweep = [run for run in observations if run.record.sweep_id == one.sweep_id]
    own = [run for run in sweep if _registered(run, one)]
    lines = [line for claim in one.experiment.claims for line in _verdict(claim, one, own)] or [NOT_CLAIMED]
    if strangers := len(sweep) - len(own):
        lines.append(
            f"left out of the sweep: {counted(strangers, 'run')} not of what was registered, or begun before it"
        )
    return lines


def _registered(run: Observation, one: Registration) -> bool:
    """Whether a run is one of the registered cells, measured later and under this registration."""
    record = run.record
    cells = {(cell["session"], cell["cell_id"]) for cell in one.cells}
    return (
        record.registration == one.sha256
        and (record.session, record.cell_id) in cells
        and datetime.fromisoformat(record.started_at) >= datetime.fromisoformat(one.registered_at)
    )


def _verdict(claim: ClaimConfig, one: Registration, own: Sequence[Observation]) -> list[str]:
    """A claim's verdict on each block that it speaks of; no verdict while registered sessions are to come."""
    meant = [
        run
        for run in own
        if applies(claim, run.record.config["gpu"]["peak_bandwidth_gbs"]) and matches(run.record.config, claim.where)
    ]
    if not meant:
        return []
    group = one.experiment.arms or ""
    arms = {
        arm: [run for run in meant if run.record.config[group]["name"] == arm]
        for arm in (one.experiment.baseline, one.experiment.candidate)
    }
    tried = min(len({run.record.session for run in runs}) for runs in arms.values())
    if tried < one.sessions:
        measured = f"{tried} of {counted(one.sessions, 'registered session')}"
        return [f"no verdict yet: {claim.claim} (measured: {measured})"]
    failed = Counter(
        f"{arm} {run.record.outcome.value}"
        for arm, runs in arms.items()
        for run in runs
        if run.record.outcome is not Outcome.OK
    )
    why = ", ".join(f"{what} x{count}" for what, count in failed.items())
    found = judged(pairs(meant, one.experiment), one.experiment, claim)
    if not found:
        return [f"no verdict: {claim.claim} (no session has both arms: {why})"]
    lost = f"; of {counted(one.sessions, 'registered session')} some have no figures: {why}" if why else ""
    return [f"{each}{lost}" for each in found]

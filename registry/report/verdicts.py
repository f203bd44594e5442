"""What was claimed beforehand, and what the sessions that were registered with it say of that."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from registry.experiments import applies, matches
from registry.outcome import Outcome
from registry.registration import INTERVAL
from registry.report.labels import counted
from registry.report.observation import pairs, without
from registry.report.paired import judged
from registry.stats import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.registration import Logged, Registration
    from registry.report.observation import Observation
    from registry.schema import ClaimConfig, ExperimentConfig

NOT_REGISTERED = "no verdict: no registration of thresholds from before these runs was found"
NOT_CLAIMED = "no verdict: no threshold was registered for this GPU and these cells"
NO_VERDICT_YET = "no verdict yet"
NOT_RUN = "not run yet"


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
    """A claim's verdict on each block that it speaks of; none while registered sessions are to come.

    Sessions that failed are no chance loss: a step that runs out of memory, or a host that is too slow, is left out
    where it is dearest. What the others say of the claim is therefore inconclusive, whatever their interval.
    """
    meant = [
        run
        for run in own
        if applies(claim, run.record.config["gpu"]["peak_bandwidth_gbs"]) and matches(run.record.config, claim.where)
    ]
    blocks: dict[str, list[Observation]] = {}
    for run in meant:
        blocks.setdefault(_block(run.record.config, one), []).append(run)
    found = pairs(meant, one.experiment)
    told = []
    for block, runs in blocks.items():
        if lost := _lost(runs, one):
            told.append(_undecided(claim, one, runs[0].record.config, lost))
        else:
            whole = [pair for pair in found if _block(pair.config, one) == block]
            told += [str(each) for each in judged(whole, one.experiment, claim)]
    return told


def _block(config: Mapping[str, Any], one: Registration) -> str:
    """What the arms of a block have in common."""
    return json.dumps(without(config, one.experiment.arms or ""), sort_keys=True)


def _lost(runs: Sequence[Observation], one: Registration) -> dict[str, set[int]]:
    """The registered sessions in which an arm of a block has no figures, by what is the matter."""
    lost: dict[str, set[int]] = {}
    for arm in (one.experiment.baseline, one.experiment.candidate):
        mine = [run.record for run in runs if run.record.config[one.experiment.arms or ""]["name"] == arm]
        for cell in {record.cell_id: None for record in mine} or {"": None}:  # an arm may have several: two caches
            for session in range(one.sessions):
                met = {r.outcome.value for r in mine if (r.cell_id, r.session) == (cell, session)} or {NOT_RUN}
                for what in sorted(met - {Outcome.OK.value}):
                    lost.setdefault(f"{arm} {what}", set()).add(session)
    return lost


def _undecided(claim: ClaimConfig, one: Registration, config: Mapping[str, Any], lost: Mapping[str, set[int]]) -> str:
    """Of how many sessions a block has both arms, which it lacks, and why."""
    whole = one.sessions - len(set().union(*lost.values()))
    missing = "; ".join(
        f"{what} in session{'s' if len(sessions) > 1 else ''} {', '.join(map(str, sorted(sessions)))}"
        for what, sessions in lost.items()
    )
    to_come = any(what.endswith(NOT_RUN) for what in lost)
    protocol = config["protocol"]
    where = f"ctx {protocol['context']}, batch {protocol['batch_size']}"
    return (
        f"{NO_VERDICT_YET if to_come else Verdict.INCONCLUSIVE.value}: {claim.claim} ({config['gpu']['name']}, "
        f"{config['model']['name']}, {where}; both arms measured in {whole} of "
        f"{counted(one.sessions, 'registered session')}: {missing})"
    )

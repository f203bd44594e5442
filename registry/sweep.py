"""The whole call: preflight, then every cell through Hydra's launcher, then table and exit code.

`prepare` runs before Hydra's main: it composes and plans every cell, refuses bad input with exit code 2,
and answers a dry run. Hydra's main then calls `SweepCallback`, which hands the cells to whichever launcher
the configuration names; `job` is what the launcher runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import secrets
import shlex
import signal
import sys
import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.experimental.callback import Callback

from registry import faults
from registry import manifest as manifests
from registry import record as records
from registry import registration as registrations
from registry.axes import check_count
from registry.compose import Composer, to_config
from registry.doors import check_flags
from registry.experiments import blocks
from registry.hardware import find_device
from registry.manifest import Planned
from registry.outcome import BadInput
from registry.plan import Cell, Planner
from registry.plugins import Catalog
from registry.record import What
from registry.redact import known_secrets, redact
from registry.resume import look
from registry.sessions import order
from registry.streams import complain, hide
from registry.validate import SERVERS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from registry.call import Call
    from registry.display import Reporter
    from registry.record import Record
    from registry.schema import Config, TrackingConfig

BAD_INPUT = 2
ABOUT = ("help", "hydra_help", "shell_completion", "cfg", "info")
"""Flags with which Hydra tells about itself and runs nothing."""
COMPLETIONS = ("install", "uninstall", "query")
IN_LABELS = (
    "quant",
    "execution",
    "attention",
    "backend",
    "model",
    "gpu",
    "context",
    "protocol.context",
    "experiment",
)
"""Keys whose values a cell's label has; an experiment's name stands beside it."""
SHELLS = ("bash", "fish", "zsh")


@dataclass
class Job:
    """One cell in one session.

    Attributes:
        overrides: The cell's.
        cell: The same, planned.
        session: Which of the sweep's sessions.
        index: Its place in the sweep.
    """

    overrides: list[str]
    cell: Cell
    session: int
    index: int

    @property
    def what(self) -> What:
        """What a record of it answers."""
        return What(self.cell.cell_id, self.session, self.cell.experiment)


@dataclass
class Sweep:
    """One call's cells.

    Attributes:
        cells: As they were typed.
        jobs: In the order in which they run.
        sweep_id: Ties the runs together.
        seed: Of the jobs' order, drawn for this sweep: the next one has another order.
        measured: What a sweep that is taken up again has measured before, by the place of its job.
        problems: Files that lie where its records should and are none.
        new: How many of its jobs a sweep that is taken up again has not had yet.
        others: How many it has had that are not in this call.
        held: Its manifest, for as long as this process lives.
    """

    cells: list[Cell]
    jobs: list[Job]
    sweep_id: str
    seed: int
    measured: dict[int, Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    new: int = 0
    others: int = 0
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def resumed(self) -> str:
        """What a sweep that is taken up again tells of that."""
        told = f"{self.sweep_id} goes on: {len(self.measured)} of {len(self.jobs)} are measured"
        if self.new or self.others:  # it was begun by another call, and shares most with this one
            shared = len(self.jobs) - self.new
            told += f"; it has {shared} of this call's {len(self.jobs)}, and {self.others} that this call has not"
        return told

    def labels(self) -> list[str]:
        """Each job's cell in one line, with those of its overrides that not all have and that the line lacks."""
        counts = Counter(text for job in self.jobs for text in {*job.overrides})
        labels = []
        for job in self.jobs:
            own = [text for text in job.overrides if counts[text] < len(self.jobs)]
            lacking = [redact(text) for text in own if text.partition("=")[0] not in IN_LABELS]
            labels.append(" ".join([job.cell.label, *lacking]))
        return labels

    @property
    def left(self) -> list[Job]:
        """The jobs that are to be run."""
        return [job for place, job in enumerate(self.jobs) if place not in self.measured]


@dataclass
class Running:
    """What `job` shares with the sweep when a launcher runs it in the sweep's own process."""

    call: Call
    reporter: Reporter


_sweep: Sweep | None = None
_running: Running | None = None


def prepare(arguments: Sequence[str]) -> list[str]:
    """Compose and plan every cell of a call before Hydra's main is entered.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The command line for Hydra's main. A sweep's overrides are not in it: Hydra would apply those that are no
        axis to the defaults, where `quant.options.block_size=32` has no place beside `quant=nf4,...`; each cell's
        are given to the launcher.

    Raises:
        SystemExit: 2 for bad input, 0 after a dry run.
    """
    global _sweep
    hide()
    try:
        args = _parse(arguments)
        check_flags(args)
        composer = _composer()
        if any(getattr(args, flag) for flag in ABOUT):
            _check_about(args, composer)
            return list(arguments)
        _sweep = preflight(args, composer)
    except BadInput as error:
        complain(str(error))
        sys.exit(BAD_INPUT)
    hide(secret for cell in _sweep.cells for secret in known_secrets(dataclasses.asdict(cell.config)))
    for problem in _sweep.problems:
        complain(f"no record: {problem}")
    if any(cell.config.dry_run for cell in _sweep.cells):
        tell_plan(_sweep)
        sys.exit(0)
    try:
        _hold(_sweep)
    except BadInput as error:
        complain(str(error))
        sys.exit(BAD_INPUT)
    kept_back = composer.cell_overrides(args.overrides)
    return [argument for argument in arguments if argument not in kept_back]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides.

    Raises:
        BadInput: A flag is unknown, or stands behind the overrides.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise BadInput(f"{message}. Flags come before the overrides: python runner.py -m quant=none,nf4")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(arguments))


def _check_about(args: argparse.Namespace, composer: Composer) -> None:
    """Refuse what Hydra would answer with a traceback or with exit code 1.

    Raises:
        BadInput: An override is wrong, or there are several cells.
    """
    if args.shell_completion:  # of overrides that are not finished yet
        _check_completion(args.overrides)
        return
    if args.hydra_help and args.overrides:  # which Hydra applies to no configuration at all
        raise BadInput("--hydra-help tells about Hydra alone and takes no overrides")
    jobs = composer.jobs(args.overrides, multirun=args.multirun)
    if args.multirun:
        try:
            composer.jobs(args.overrides, multirun=False)
        except BadInput as error:
            raise BadInput("what Hydra tells about is one cell: leave out -m, and give each key one value") from error
    for job_overrides in jobs:
        hide(known_secrets(dataclasses.asdict(composer.cell(job_overrides))))


def _check_completion(overrides: Sequence[str]) -> None:
    """Refuse what Hydra's completion of a shell's words cannot be asked.

    Raises:
        BadInput: It is not one word to one shell, or no shell asks.
    """
    asked = [(command, shell) for command, _, shell in (text.partition("=") for text in overrides)]
    [(command, shell)] = asked if len(asked) == 1 else [("", "")]
    if command not in COMPLETIONS or shell not in SHELLS:
        raise BadInput(f"--shell-completion takes {', '.join(COMPLETIONS)}=SHELL, a shell of {', '.join(SHELLS)}")
    if command == "query" and "COMP_LINE" not in os.environ:
        raise BadInput("--shell-completion query=SHELL is the shell's own question, which it asks in COMP_LINE")


def tell_plan(sweep: Sweep) -> None:
    """Print a dry run."""
    from registry.display import console, plan_notes, plan_table

    out = console()
    out.print(plan_table(sweep.cells))
    for line in plan_notes(sweep.cells):
        out.print(line, highlight=False, markup=False)
    if sweep.measured:
        out.print(sweep.resumed, highlight=False, markup=False)


def _hold(sweep: Sweep) -> None:
    """Write what the sweep sets out to measure, and hold it until this process ends.

    A sweep that goes on is looked at once more when it is held: who held it before may have measured more of it.

    Raises:
        BadInput: Another process measures this sweep, or nothing can be written.
    """
    folder = Path(sweep.cells[0].config.records)

    def planned() -> manifests.Manifest:
        if sweep.cells[0].config.resume:
            now = _taken_up(sweep, sweep.sweep_id)
            sweep.jobs, sweep.measured = now.jobs, now.measured
        jobs = [Planned(job.index, *job.what, label) for job, label in zip(sweep.jobs, sweep.labels(), strict=True)]
        return manifests.extended(folder, sweep.sweep_id, jobs)

    try:
        held = manifests.hold(folder, sweep.sweep_id, planned)
    except OSError as error:
        raise BadInput(f"records={folder} cannot be written: {error}") from error
    if held is None:
        raise BadInput(
            f"another process measures the sweep {sweep.sweep_id}: wait for it (rfloor status {folder} tells how far "
            "it is), or leave out resume=true and measure every cell anew"
        )
    sweep.held = held


def preflight(args: argparse.Namespace, composer: Composer) -> Sweep:
    """Every cell of the call, planned.

    Raises:
        BadInput: One cell or more cannot be meant: all of their problems, each once.
    """
    jobs = composer.jobs(args.overrides, multirun=args.multirun)
    planner = _planner()
    cells: list[Cell] = []
    problems: dict[str, str] = {}
    for job_overrides in jobs:
        try:
            cells.append(planner.plan(composer.cell(job_overrides)))
        except BadInput as error:
            problems.setdefault(str(error), " ".join(job_overrides))
    for what, values, way in (
        ("tracking", [str(cell.config.tracking) for cell in cells], "tracking is no axis"),
        ("folder of records", [cell.config.records for cell in cells], "give records=FOLDER"),
        ("number of sessions", [cell.config.protocol.sessions for cell in cells], "give protocol.sessions=N"),
        ("resume", [cell.config.resume for cell in cells], "give resume=true or none"),
    ):
        if len(set(values)) > 1:
            told = f"a sweep has one {what} for all of its cells: {way}, or run them one after the other"
            problems.setdefault(told, " ".join(args.overrides))
    if problems:
        many = len(jobs) > 1
        raise BadInput("\n        ".join(f"{p} (in: {where})" if many else p for p, where in problems.items()))
    jobs, cells = _once(jobs, cells)
    seed = secrets.randbits(32)
    check_count(len(cells) * cells[0].config.protocol.sessions, "this sweep")
    ordered = order(blocks(jobs, cells), cells[0].config.protocol.sessions, seed)
    found = [Job(jobs[cell], cells[cell], session, place) for place, (session, cell) in enumerate(ordered)]
    sweep = Sweep(cells, found, f"{faults.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", seed)
    return _taken_up(sweep) if cells[0].config.resume else sweep


def _once(jobs: Sequence[list[str]], cells: Sequence[Cell]) -> tuple[list[list[str]], list[Cell]]:
    """Without the cells that two products of an experiment share, however each of them writes the same."""
    places: dict[object, int] = {}
    for place, cell in enumerate(cells):
        config = json.dumps(dataclasses.asdict(cell.config), sort_keys=True, default=str)
        places.setdefault(config if cell.experiment else place, place)
    return [jobs[place] for place in places.values()], [cells[place] for place in places.values()]


def _taken_up(sweep: Sweep, name: str = "") -> Sweep:
    """The sweep as what is left of one that was begun before; as it is where none was.

    Args:
        sweep: As it was planned.
        name: Of the one that goes on, where that is known already.

    Raises:
        BadInput: Its thresholds are no longer those that were registered.
    """
    folder = Path(sweep.cells[0].config.records)
    profiled = any(cell.config.protocol.profiled_steps for cell in sweep.cells)
    before = look([job.what for job in sweep.jobs], folder, profiled, name)
    if not before.sweep_id:
        return dataclasses.replace(sweep, problems=before.problems)
    jobs = [dataclasses.replace(job, index=index) for job, index in zip(sweep.jobs, before.places, strict=True)]
    in_order = sorted(range(len(jobs)), key=before.places.__getitem__)  # in which they were to run from the beginning
    measured = {now: before.found[then] for now, then in enumerate(in_order) if then in before.found}
    for experiment in {cell.experiment: cell.config.experiment for cell in sweep.cells if cell.experiment}.values():
        registrations.check_claims(before.sweep_id, experiment, folder)
    jobs = [jobs[then] for then in in_order]
    return Sweep(sweep.cells, jobs, before.sweep_id, sweep.seed, measured, before.problems, before.new, before.others)


@cache
def _composer() -> Composer:
    """This process's composer: what it composed and found for the preflight serves the planner too."""
    return Composer(Catalog())


@cache
def _planner() -> Planner:
    """This process's planner; a launcher's remote process makes its own."""
    composer = _composer()
    return Planner(composer.catalog, composer.profiles(), find_device())


class SweepCallback(Callback):
    """Hydra's callback that runs the sweep and ends the process with its exit code."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Run every cell.

        Raises:
            SystemExit: 0 when every cell is ok, oom or unsupported and logged, else 1. Whatever else were to leave
                this method Hydra would swallow, and measure every cell again in its own way.
        """
        code = 1
        try:
            assert _sweep is not None, "runner.py calls prepare() before Hydra's main"
            code = run(_sweep, config)
        except Exception as error:
            with contextlib.suppress(Exception):  # nobody may be left to be told
                _tell_failure(error)
        raise SystemExit(code)


def _tell_failure(error: Exception) -> None:
    """Print what ended a sweep outside of its cells."""
    if isinstance(error, OSError):
        complain(f"{error}; the same call with resume=true goes on")
    else:
        traceback.print_exception(error)


def run(sweep: Sweep, composed: DictConfig) -> int:
    """Launch the cells, tell how they ended, and return the exit code."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    from registry import logs
    from registry.call import Call
    from registry.display import Reporter, console
    from registry.experiment_runs import close_runs, open_runs
    from registry.importing import log_missing
    from registry.registration import register
    from registry.report.terminal import tell_report

    global _running
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=_callbacks()),
        task_function=job,
        config=composed,
    )
    config = sweep.cells[0].config
    folder = Path(config.records)
    registered = register(sweep.sweep_id, [(job.session, job.cell) for job in sweep.jobs], sweep.seed)
    registered = [registrations.first(one, folder) for one in registered]
    hashes = {one.experiment.name: one.sha256 for one in registered}
    jobs = [
        [
            *job.overrides,
            f"sweep_id={sweep.sweep_id}",
            f"session={job.session}",
            f"place={job.index}",
            f"registration={hashes.get(job.cell.experiment, 'null')}",
        ]
        for job in sweep.left
    ]
    if sweep.measured:
        console().print(sweep.resumed, highlight=False, markup=False)
    with Reporter(len(jobs)) as reporter:
        call = Call(sweep.sweep_id, None, reporter.stage, hashes)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                signal.signal(number, call.interrupt)
        reporter.stage(f"opening {config.tracking.uri.partition('://')[0]} tracking")
        _track(call, config.tracking)
        call.tracked(lambda mlflow: mlflow.close_left())
        logs.finish_abandoned(folder)
        kept = [(record.file(folder), record) for record in sweep.measured.values()]
        call.tracked(lambda mlflow: log_missing(kept, mlflow) if kept else None)  # what the last call could not log
        opened = open_runs(registered, Path(config.records), call)
        _running = Running(call, reporter)
        gc.freeze()  # what is here stays: to look through it after every cell would take 0.1 s
        ended = [one.return_value for one in launcher.launch(jobs, initial_job_idx=0)] if jobs else []
    found, problems = _records(ended)
    for problem in problems:
        complain(f"no record: {problem}")
    found = sorted([*sweep.measured.values(), *found], key=lambda record: record.index)
    errors = {one["tracking_error"] for one in ended if one["tracking_error"]}
    _tell(found)
    for report, files in close_runs(opened, found, call):
        tell_report(report, files)
    if call.tracking_error:
        errors.add(call.tracking_error)
    reports = [["rfloor", "report", one.experiment.name, f"sweep={sweep.sweep_id}"] for one in registered]
    _tell_where(errors, config, call.tracker.page if call.tracker else "", reports)
    return 0 if not errors and not problems and all(record.outcome.benign for record in found) else 1


def job(config: DictConfig) -> dict[str, Any]:
    """One cell, as a launcher runs it.

    Returns:
        The record in its plain form under `record`, and what MLflow said under `tracking_error`. A launcher in the
        sweep's own process, which keeps all this to the sweep's end, gets the record's `file` in its place.
    """
    from hydra.core.hydra_config import HydraConfig

    from registry.call import Call
    from registry.run import run_cell

    number = HydraConfig.get().job.num
    if _running and _sweep:  # as planned before the sweep began, whatever has become of its files since
        planned, call = _sweep.left[number], _running.call
        cell, session, index = planned.cell, planned.session, planned.index
        _running.reporter.begin(cell.label)
    else:
        cell, session, index = _planner().plan(to_config(config)), int(config.session), int(config.place)
        call = Call(config.sweep_id, None, lambda _: None, {cell.experiment: config.registration or ""})
        _track(call, cell.config.tracking)
    record = run_cell(cell, index, session, call)
    file = record.file(Path(cell.config.records))
    if _running:
        _running.reporter.done(record)
    kept = {"file": str(file)} if _running and file.exists() else {"record": record.plain()}
    return {**kept, "tracking_error": call.tracking_error}


def _records(ended: Sequence[dict[str, Any]]) -> tuple[list[Record], list[str]]:
    """The records of what `job` gave back, and a line for each that somebody has spoilt since."""
    found, problems = [], []
    for one in ended:
        try:
            found.append(records.read(Path(one["file"])) if "file" in one else records.from_plain(one["record"]))
        except records.BadRecord as error:
            problems.append(str(error))
    return found, problems


def _track(call: Call, tracking: TrackingConfig) -> None:
    """Open MLflow, or note why that failed."""
    from registry.mlflow_client import TrackingDown
    from registry.tracking import Tracker

    try:
        call.tracker = Tracker(tracking)
    except TrackingDown as error:
        call.tracking_error = str(error)


def _tell(found: Sequence[Record]) -> None:
    """Print the tables and what weakens them."""
    from registry.display import console, notes, results

    out = console()
    for table in results(found, out.width):
        out.print(table)
    for line in notes(found):
        out.print(line, highlight=False, markup=False)


def _tell_where(errors: set[str], config: Config, page: str, reports: Sequence[Sequence[str]] = ()) -> None:
    """Print what MLflow did not take, and where to see what it took.

    Args:
        errors: What MLflow said.
        config: Of any cell.
        page: Where the UI shows the runs.
        reports: Commands that draw what an import does not bring: an experiment's verdict and report.
    """
    from registry.display import console

    out = console()
    uri = redact(config.tracking.uri)
    where = [f"tracking.uri={uri}", *_elsewhere(config.tracking)]
    later = " && ".join(
        shlex.join([*command, *where]) for command in (["rfloor", "import", config.records], *reports)
    )
    for error in errors:
        told = f"MLflow did not take every run ({error}). Once it does: {later}"
        out.print(told, highlight=False, markup=False, soft_wrap=True)
    if uri.startswith(SERVERS):
        opens = f"open {uri.rstrip('/')}{page}"
    else:
        opens = f"{_mlflow()} ui --host 127.0.0.1 --backend-store-uri {_absolute(uri)}, then open http://127.0.0.1:5000{page}"
    out.print(f"Compare the runs in the MLflow UI: {opens}", highlight=False, markup=False, soft_wrap=True)


def _elsewhere(tracking: TrackingConfig) -> list[str]:
    """What an import has to be told beside the address where runs and artifacts go elsewhere than they would."""
    usual = _composer().cell(["tracking=local"]).tracking
    chosen = {"experiment": tracking.experiment, "artifacts": tracking.artifacts}
    if tracking.uri.startswith(SERVERS):
        del chosen["artifacts"]  # the server's own business
    return [f"tracking.{key}={value}" for key, value in chosen.items() if value and value != getattr(usual, key)]


def _mlflow() -> str:
    """The mlflow command beside this interpreter: a bare name needs an activated environment."""
    beside = Path(sys.executable).with_name("mlflow")
    return str(beside) if beside.exists() else "mlflow"


def _absolute(uri: str) -> str:
    scheme, _, path = uri.partition(":///")
    return f"sqlite:///{Path(path).absolute()}" if scheme == "sqlite" else uri


class _Forget(Callback):
    """Lets go of each job's configurations, which the launcher would keep to the sweep's end: 0.2 MB a cell.

    Their nodes hold one another, so they lie there until they are collected: unasked, some forty cells later.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """A job has ended; only what it returns is asked for."""
        job_return.cfg = job_return.hydra_cfg = None
        gc.collect()


def _callbacks() -> Any:
    """What the launcher calls around each job: not the sweep's own callback, which has called it."""
    from hydra._internal.callbacks import Callbacks

    found = Callbacks()
    found.callbacks = [_Forget()]
    return found

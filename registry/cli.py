"""The `rfloor` command: what is done before and after measuring."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.architecture import Architecture
from registry.archive import records_in
from registry.checkpoint import CheckpointFormat
from registry.compose import Composer
from registry.display import console, tell_status
from registry.export import export
from registry.importing import import_records
from registry.mlflow_client import TrackingDown
from registry.outcome import BadInput, Refused, nearest
from registry.plan import plugin_options
from registry.plugins import Catalog
from registry.report.terminal import tell_report
from registry.status import statuses
from registry.streams import complain, hide
from registry.synthesis import write_checkpoint
from registry.validate import validate
from registry.weights import check_weights, open_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

PRICE = "price."


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 1 when MLflow or a record failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="rfloor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="log records into MLflow, each once however often this is called")
    importer.add_argument("folder", type=Path, help="records, or a folder that holds some")
    importer.add_argument("overrides", nargs="*", metavar="tracking.KEY=VALUE", help="where MLflow is")
    synthesizer = commands.add_parser(
        "synthesize", help="write a model folder in a quantised format, out of random weights or of a folder's"
    )
    synthesizer.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="model=... quant=... out=DIR, and their options"
    )
    reporter = commands.add_parser("report", help="tell of an experiment's runs in MLflow: a page, tables, verdicts")
    reporter.add_argument("experiment", help="its name; python runner.py --help lists them")
    reporter.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="out=DIR, sweep=ID,ID, price.GPU=DOLLARS_AN_HOUR, tracking.KEY=VALUE",
    )
    exporter = commands.add_parser("export", help="write records as the study's own cell files")
    exporter.add_argument("--study", type=Path, required=True, metavar="DIR", help="where to")
    exporter.add_argument("folder", type=Path, nargs="?", default=Path("records"), help="records (default: records)")
    teller = commands.add_parser("status", help="tell what of each sweep is measured, failed or missing")
    teller.add_argument("folder", type=Path, nargs="?", default=Path("records"), help="records (default: records)")
    teller.add_argument("sweep", nargs="*", help="tell of these alone, cell by cell")
    hide()
    args = parser.parse_args(arguments)
    try:
        if args.command == "status":
            return _status(args.folder, args.sweep)
        if args.command == "export":
            return _export(args.folder, args.study)
        if args.command == "report":
            return _report(args.experiment, args.overrides)
        if args.command == "synthesize":
            return _synthesize(args.overrides)
        return _import(args.folder, args.overrides)
    except BadInput as error:
        complain(str(error))
        return 2
    except Refused as error:
        complain(str(error))
        return 1
    except TrackingDown as error:
        complain(f"MLflow cannot be reached: {error}")
        return 1


def _synthesize(overrides: list[str]) -> int:
    """Write `out=DIR`; on the GPU if there is one."""
    folders = [text.partition("=")[2] for text in overrides if text.startswith("out=")]
    if len(folders) != 1 or not folders[0]:
        raise BadInput("name one folder that does not exist: out=DIR")
    catalog = Catalog()
    composer = Composer(catalog)
    (job,) = composer.jobs([text for text in overrides if not text.startswith("out=")], multirun=False)
    config = composer.cell(job)
    validate(config)
    architecture = Architecture.of(config.model)
    plugin: Any = catalog.load("quant", config.quant.plugin)
    if not issubclass(plugin, CheckpointFormat):
        raise BadInput(f"quant={config.quant.name} is no format that folders are written in")
    form: CheckpointFormat = plugin(plugin_options("quant", plugin, config.quant))
    form.fits(architecture)
    check_weights(config.model.weights, architecture, None)
    import torch

    source = open_weights(config.model.weights, config.model.revision, config.protocol.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with console().status("writing") as status, torch.inference_mode():
            write_checkpoint(
                Path(folders[0]), architecture, source, form, device, lambda done: status.update(f"{done}")
            )
    except OSError as error:
        raise BadInput(f"out={folders[0]} cannot be written: {error}") from error
    print(f"{folders[0]}: run it with model.weights={folders[0]} quant={config.quant.name} model={config.model.name}")
    return 0


def _report(name: str, overrides: list[str]) -> int:
    """Write an experiment's report to `out=DIR` and log it to the runs of its sweeps."""
    from registry.report.recorded import report

    composer = Composer(Catalog())
    given = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    own = {key for key in given if key in ("out", "sweep") or key.startswith(PRICE)}
    for text in overrides:
        key, given_one, value = text.partition("=")
        if key not in own and not key.startswith("tracking"):
            raise BadInput(
                f"{text}: a report takes out=, sweep=, price.GPU= and tracking.KEY=, and tells of every cell"
            )
        if key in own and not (given_one and value):
            raise BadInput(f"{text}: {key}=VALUE")
    if len(own) < len([text for text in overrides if text.partition("=")[0] in own]):
        raise BadInput(f"given twice: {' '.join(overrides)}")
    known = _experiments(composer)
    if name not in known:
        raise BadInput(f"no experiment is called {name!r}: {nearest(name, known)}")
    (job,) = composer.jobs([text for text in overrides if text.partition("=")[0] not in own], multirun=False)
    config = composer.cell([*job, f"experiment={name}"])
    validate(config)
    sweeps = [sweep for sweep in given.get("sweep", "").split(",") if sweep]
    folder = Path(given.get("out") or f"reports/{name}")
    prices = {key.removeprefix(PRICE): _price(key, given[key], composer) for key in own if key.startswith(PRICE)}
    try:
        found, files, problems = report(config, sweeps, folder, prices)
    except OSError as error:
        raise BadInput(f"out={folder} cannot be written: {error}") from error
    tell_report(found, files)
    return _told(problems)


def _export(folder: Path, target: Path) -> int:
    """Write the study's files out of a folder of records."""
    _check_folder(folder)
    composer = Composer(Catalog())
    experiments = {name: composer.cell([f"experiment={name}"]).experiment for name in _experiments(composer)}
    found, problems = records_in(folder)
    try:
        done = export(found, experiments, target)
    except OSError as error:
        raise BadInput(f"--study {target} cannot be written: {error}") from error
    print(
        f"{len(done.files)} files in {target}; {done.left_out} records are of no cell that the study has a file for"
    )
    if done.renamed:
        print(f"{done.renamed} of them are of cells that share the study's name: sweep and cell stand behind it")
    return _told(problems)


def _status(folder: Path, wanted: Sequence[str]) -> int:
    """Tell of the sweeps under a folder of records, cell by cell of those that are named."""
    _check_folder(folder)
    found, problems = statuses(folder)
    known = {status.sweep_id: status for status in found}
    for sweep_id in wanted:
        if sweep_id not in known:
            raise BadInput(f"no sweep of {folder} is called {sweep_id!r}: {nearest(sweep_id, known)}")
    tell_status([known[sweep_id] for sweep_id in wanted] if wanted else found, in_full=bool(wanted))
    return _told(problems)


def _check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        BadInput: Nor could be one, as a name that is too long.
    """
    try:
        found = folder.is_dir()
    except OSError:
        found = False
    if not found:
        raise BadInput(f"{folder} is no folder")


def _experiments(composer: Composer) -> list[str]:
    return [option for option in composer.options("experiment") if option != "none"]


def _price(key: str, value: str, composer: Composer) -> float:
    """Dollars an hour.

    Raises:
        BadInput: No such GPU profile, or no price.
    """
    gpus = [option for option in composer.options("gpu") if option != "auto"]
    if key.removeprefix(PRICE) not in gpus:
        raise BadInput(f"{key}: no GPU profile is called that: {nearest(key.removeprefix(PRICE), gpus)}")
    try:
        price = float(value)
    except ValueError:
        price = 0.0
    if not 0 < price < math.inf:
        raise BadInput(f"{key}={value}: dollars an hour, more than 0")
    return price


def _told(problems: Sequence[str]) -> int:
    """The exit code, once every file or run that is no record is named."""
    for problem in problems:
        complain(f"no record: {problem}")
    return 1 if problems else 0


def _import(folder: Path, overrides: list[str]) -> int:
    _check_folder(folder)
    composer = Composer(Catalog())
    (job,) = composer.jobs(overrides, multirun=False)
    config = composer.cell(job)
    validate(config)
    counts, problems = import_records(folder, config.tracking)
    print(", ".join(f"{counts[state]} {state}" for state in ("imported", "completed", "present")))
    return _told(problems)


if __name__ == "__main__":
    sys.exit(main())

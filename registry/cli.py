"""The `rfloor` command: what is done with records after they were measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from registry.compose import Composer
from registry.outcome import BadInput
from registry.plugins import Catalog
from registry.tracking import TrackingDown, import_records
from registry.validate import redact, validate


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0, 1 when MLflow or a record failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="rfloor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="log records into MLflow, each once however often this is called")
    importer.add_argument("folder", type=Path, help="records, or a folder that holds some")
    importer.add_argument("overrides", nargs="*", metavar="tracking.KEY=VALUE", help="where MLflow is")
    args = parser.parse_args(arguments)
    try:
        return _import(args.folder, args.overrides)
    except BadInput as error:
        print(f"rfloor: {redact(str(error))}", file=sys.stderr)
        return 2
    except TrackingDown as error:
        print(f"rfloor: MLflow cannot be reached: {redact(str(error))}", file=sys.stderr)
        return 1


def _import(folder: Path, overrides: list[str]) -> int:
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder")
    composer = Composer(Catalog())
    (job,) = composer.jobs(overrides, multirun=False)
    config = composer.cell(job)
    validate(config)
    counts, problems = import_records(folder, config.tracking)
    print(", ".join(f"{counts[state]} {state}" for state in ("imported", "completed", "present")))
    for problem in problems:
        print(f"rfloor: no record: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

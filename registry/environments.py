"""Virtual environments beside rfloor's own, for runtimes that need other versions of the same packages."""

from __future__ import annotations

import importlib.metadata
import os
import site
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent


def interpreter(environment: str) -> Path:
    """The Python of an environment, whose folder is given from the checkout's root on."""
    return ROOT / environment / "bin" / "python"


def import_path(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables by which a Python that is started imports this code, and nothing out of the folder that it starts in.

    That folder would otherwise come first on the path of `python -m`, and a file of it that is called as a package
    is, `torch.py`, would run in the package's place. An empty part of PYTHONPATH means that folder too.

    Args:
        environment: Whose PYTHONPATH stays, behind what this code lies in; where that is Python's own folder for what
            is installed, it is on the path already, behind the standard library.
    """
    installed = str(ROOT) in (*site.getsitepackages(), site.getusersitepackages())
    parts = [*([] if installed else [str(ROOT)]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, parts))}


def version(package: str, environment: str = "") -> str | None:
    """A package's installed version, `None` where it is not installed.

    Args:
        package: Its name on the index.
        environment: Where to look; empty is the environment that runs this.
    """
    if not environment:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    folders = [str(folder) for folder in interpreter(environment).parent.parent.glob("lib/python3*/site-packages")]
    found = importlib.metadata.distributions(name=package, path=folders)
    return next((distribution.version for distribution in found), None)

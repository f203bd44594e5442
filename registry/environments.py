"""Virtual environments beside rfloor's own, for runtimes that need other versions of the same packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def interpreter(environment: str) -> Path:
    """The Python of an environment, whose folder is given from the checkout's root on."""
    return ROOT / environment / "bin" / "python"


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

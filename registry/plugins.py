"""Plugins by name: found through entry points, imported when a cell asks for them.

Discovery reads package metadata and imports nothing, so a plugin that cannot be imported, or whose
dependencies are missing, is the outcome of the one cell that names it and of no other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.outcome import BadInput, Outcome, Refused, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

KINDS = {
    "backend": "rfloor.backends",
    "quant": "rfloor.quant",
    "attention": "rfloor.attention",
}
"""Kind of plugin, which is also its config group -> entry-point group."""

CONF_GROUP = "rfloor.conf"
"""Entry points of this group name a folder (`package.folder`) that joins Hydra's search path."""


@dataclass(frozen=True)
class Claim:
    """One distribution's claim to one plugin name."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str


class Catalog:
    """Every plugin that the installed distributions announce."""

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        self._given = None if entry_points is None else list(entry_points)

    def _entry_points(self, group: str) -> list[EntryPoint]:
        if self._given is not None:
            return [entry for entry in self._given if entry.group == group]
        return list(importlib.metadata.entry_points(group=group))

    @cached_property
    def claims(self) -> list[Claim]:
        """All claims, each once: a checkout that is installed and on the path announces itself twice."""
        found = {
            Claim(
                kind,
                entry.name,
                entry.value,
                entry.dist.name if entry.dist else "?",
                entry.dist.version if entry.dist else "?",
            )
            for kind, group in KINDS.items()
            for entry in self._entry_points(group)
        }
        return sorted(found, key=lambda claim: (claim.kind, claim.name, claim.distribution))

    def names(self, kind: str) -> list[str]:
        """The plugin names of one kind, sorted."""
        return sorted({claim.name for claim in self.claims if claim.kind == kind})

    def find(self, kind: str, name: str) -> Claim:
        """The one claim to `name`.

        Raises:
            BadInput: No installed distribution has a plugin of this kind and name.
            Refused: More than one has (`missing_dependency`: the environment has to be mended).
        """
        claims = [claim for claim in self.claims if claim.kind == kind and claim.name == name]
        if not claims:
            raise BadInput(f"no {kind} plugin is called {name!r}: {nearest(name, self.names(kind))}")
        if len(claims) > 1:
            owners = sorted(claim.distribution for claim in claims)
            raise Refused(
                Outcome.MISSING_DEPENDENCY,
                f"the {kind} plugin {name!r} is claimed by {' and by '.join(owners)}",
                f"Keep one: pip uninstall {owners[-1]}",
            )
        return claims[0]

    def load(self, kind: str, name: str) -> type[Any]:
        """Import the class behind a plugin name.

        Raises:
            BadInput: As `find`.
            Refused: As `find`; `missing_dependency` when an import fails, `crash` when the plugin's own
                code does.
        """
        claim = self.find(kind, name)
        try:
            return load_target(claim.target)
        except ImportError as error:
            raise Refused(
                Outcome.MISSING_DEPENDENCY,
                f"the {kind} plugin {name!r} of {claim.distribution} cannot be imported: {error}",
                f"Try: pip install --force-reinstall {claim.distribution}",
            ) from error
        except (Exception, SystemExit) as error:
            raise Refused(
                Outcome.CRASH,
                f"importing the {kind} plugin {name!r} of {claim.distribution} raised "
                f"{type(error).__name__}: {error}",
                f"Mend {claim.target} or: pip uninstall {claim.distribution}",
            ) from error

    def conf_folders(self) -> list[Path]:
        """The YAML folders that plugins bring; one that does not exist is passed over.

        A folder is found through its top-level package's spec, which imports nothing.
        """
        folders = []
        for entry in self._entry_points(CONF_GROUP):
            package, *rest = entry.value.split(".")
            try:
                spec = importlib.util.find_spec(package)
            except (ImportError, ValueError):
                continue
            for root in (spec.submodule_search_locations or []) if spec else []:
                folder = Path(root).joinpath(*rest)
                if folder.is_dir() and folder not in folders:
                    folders.append(folder)
        return folders


def load_target(target: str) -> type[Any]:
    """Import `module:Class`.

    Raises:
        ImportError: The module cannot be imported or has no such class.
        Exception: Whatever the module's own code raises.
    """
    module_name, _, attribute = target.partition(":")
    importlib.import_module(module_name)
    try:
        found = getattr(sys.modules[module_name], attribute)
    except AttributeError as error:
        raise ImportError(f"{module_name} has no {attribute!r}") from error
    if not isinstance(found, type):
        raise ImportError(f"{target} is no class")
    return found

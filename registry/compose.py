"""Command line to cells: the whole sweep composed and checked before Hydra's main is entered.

Hydra composes every job of a sweep anew and finds a typo only when it gets there, with folders already
on disk. Here each combination of group choices is composed once, the value overrides are applied to a
copy with Hydra's own code, and every mistake in any cell refuses the whole call.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from typing import TYPE_CHECKING, Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from registry import doors
from registry.axes import TOLD, check_count, check_product, texts
from registry.environments import ROOT
from registry.outcome import BadInput, nearest
from registry.plugins import KINDS, Catalog
from registry.schema import GROUPS, Config, GpuConfig, from_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.override_parser.types import Override

CONF = ROOT / "conf"
CONFIG_NAME = "config"
EXPERIMENT = "experiment"
NO_EXPERIMENT = [f"{EXPERIMENT}=none"]
SHORT = {"protocol.context": "context"}
"""Keys that have a short form."""
OPEN_KEYS = re.compile(r"^((backend|quant|attention)\.options|model\.rope_scaling)\.\w")
"""Where `+key=value` may add a key: the plugins' own options."""


class PluginSearchPath(SearchPathPlugin):
    """Appends the plugins' YAML folders behind rfloor's own, which therefore win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls this whenever it makes a search path."""
        for folder in Catalog().conf_folders():
            search_path.append(provider="rfloor-plugin", path=f"file://{folder}")


def register(catalog: Catalog) -> None:
    """Make Hydra know the schema, the plugins' folders, and every plugin that brings no YAML."""
    store = ConfigStore.instance()
    store.store(name="rfloor_schema", node=Config)
    Plugins.instance().register(PluginSearchPath)
    for kind in KINDS:
        for name in catalog.names(kind):
            if not any((folder / kind / f"{name}.yaml").exists() for folder in (CONF, *catalog.conf_folders())):
                store.store(group=kind, name=name, node={"name": name})


class Composer:
    """Composes cells from overrides, each combination of groups once.

    Args:
        catalog: The plugins, whose names are options of their groups.
    """

    def __init__(self, catalog: Catalog) -> None:
        register(catalog)
        self.catalog = catalog
        self._loader = ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONF)))
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._hydra: dict[str, Any] = {}

    def options(self, group: str) -> list[str]:
        """The options of a config group, YAML and plugins alike."""
        return sorted(self._loader.get_group_options(group, ObjectType.CONFIG))

    def profiles(self) -> dict[str, GpuConfig]:
        """Every concrete GPU profile, by its name."""
        profiles = [self.cell([f"gpu={option}"]).gpu for option in self.options("gpu") if option != "auto"]
        return {profile.name: profile for profile in profiles}

    def jobs(self, overrides: Sequence[str], multirun: bool) -> list[list[str]]:
        """Every cell's overrides, in Hydra's order: the last axis varies fastest.

        Args:
            overrides: As typed.
            multirun: Whether `-m` was given.

        Raises:
            BadInput: An override that cannot be parsed, is not allowed, or names what does not exist; a sweep
                without `-m`.
        """
        parsed = [self._parse(text) for text in overrides]
        for override in parsed:
            self._check(override, multirun)
        self._check_hydra([override.input_line or "" for override in parsed if override.is_hydra_override()])
        axes = {o.get_key_element(): texts(o) for o in parsed if not o.is_hydra_override()}
        if axes.get(EXPERIMENT, NO_EXPERIMENT) == NO_EXPERIMENT:
            check_product(axes.values())
            return [list(job) for job in itertools.product(*axes.values())]
        jobs: dict[tuple[str, ...], None] = {}  # in order, and those that two products of an experiment share once
        for experiment in axes.pop(EXPERIMENT):
            for product in self._products(experiment, multirun):
                own = _with(product, axes)
                check_product(own.values())
                jobs |= dict.fromkeys(itertools.product(*own.values()))
                check_count(len(jobs), EXPERIMENT)
        return [list(job) for job in jobs]

    def _products(self, experiment: str, multirun: bool) -> list[dict[str, list[str]]]:
        """The axes of each product of an experiment's cells."""
        config = to_config(self._groups((experiment,))).experiment
        if experiment != f"{EXPERIMENT}={config.name}":
            raise BadInput(f"{experiment} calls itself {config.name!r}: its runs and reports are found by one name")
        if not multirun:
            raise BadInput(f"{experiment} is a sweep, add -m: python runner.py -m {experiment} ...")
        if not config.cells:
            raise BadInput(f"{experiment} measures nothing, it tells of recorded runs: rfloor report {config.name}")
        products = []
        for cells in config.cells:
            try:
                parsed = [self._parse(_text(str(key), value)) for key, value in cells.items()]
            except BadInput as error:
                raise BadInput(f"the cells of {experiment}: {error}") from error
            for override in parsed:
                if override.is_hydra_override():
                    raise BadInput(f"{experiment}: {override.input_line} is Hydra's own and no axis of a cell")
                self._check(override, multirun=True)
            products.append({EXPERIMENT: [experiment]} | {o.get_key_element(): texts(o) for o in parsed})
        return products

    def cell_overrides(self, overrides: Sequence[str]) -> list[str]:
        """Those of a call's overrides that are its cells' and not Hydra's own."""
        return [text for text in overrides if not self._parse(text).is_hydra_override()]

    def _parse(self, text: str) -> Override:
        """One override.

        Raises:
            BadInput: It cannot be read; what Hydra's grammar and functions raise is of many kinds.
        """
        try:
            [parsed] = self._parser.parse_overrides([text])
        except RecursionError as error:
            raise BadInput(f"cannot read an override: nested too deeply: {text[:TOLD]}...") from error
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            told = lines[:2] if lines[0].startswith("Error parsing") else lines[:1]  # the next says what and why
            raise BadInput(f"cannot read an override: {' '.join(told)}") from error
        return parsed

    def _check(self, override: Override, multirun: bool) -> None:
        doors.check_override(override)
        text, key = override.input_line or "", override.key_or_group
        if override.is_hydra_override():
            if key == doors.LAUNCHER:
                self._check_options(key, override)
            return
        if (override.is_add() or override.is_force_add()) and not OPEN_KEYS.match(key):
            raise BadInput(f"{text}: + adds a plugin's option (quant.options.NAME), nothing else")
        if override.is_sweep_override() and not multirun:
            raise BadInput(f"{text}: several values are a sweep, add -m: python runner.py -m {text} ...")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise BadInput(f"{text}: a sweep lists its values: {key}=A,B or {key}=range(1,4)")
        if key in GROUPS:
            self._check_options(key, override)
        elif not (override.is_add() or override.is_force_add()):
            self._check_key(key)
        if not texts(override):
            raise BadInput(f"{text}: this sweep has no values")

    def _check_options(self, group: str, override: Override) -> None:
        known = self.options(group)
        for choice in texts(override):
            option = choice.partition("=")[2].strip("'\"")
            if option not in known:
                raise BadInput(f"no {group} is called {option!r}: {nearest(option, known)}")

    def _check_hydra(self, overrides: list[str]) -> None:
        if overrides:
            try:
                doors.check_launcher(self._load(overrides, RunMode.MULTIRUN))
            except OmegaConfBaseException as error:
                raise BadInput(explain(error)) from error

    def _check_key(self, key: str) -> None:
        node: Any = self._groups(())
        seen: list[str] = []
        for part in key.split("."):
            children = [str(child) for child in node] if isinstance(node, DictConfig) else []
            if part not in children:
                if OPEN_KEYS.match(key):
                    return  # which options there are depends on the group's choice: composing tells
                known = [".".join([*seen, child]) for child in children]
                elsewhere = [path for path in _leaves(self._groups(())) if path.endswith(f".{key}")]
                raise BadInput(f"no key is called {key!r}: {nearest('.'.join([*seen, part]), [*known, *elsewhere])}")
            seen.append(part)
            node = node._get_node(part)

    def _groups(self, choices: tuple[str, ...]) -> DictConfig:
        if choices not in self._composed:
            config = self._load(choices, RunMode.RUN)
            hydra: Any = OmegaConf.to_container(config.hydra, resolve=False)
            if not choices:
                self._hydra = hydra
            else:
                self._groups(())
                doors.check_unchanged(self._hydra, hydra, " ".join(choices))
            config._set_flag("struct", False)
            del config["hydra"]  # not part of a cell, and most of the cost of a copy
            config._set_flag("struct", True)
            self._composed[choices] = config
        return self._composed[choices]

    def _load(self, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        """What Hydra composes.

        Raises:
            BadInput: It cannot; whatever a damaged file makes it raise.
        """
        try:
            return self._loader.load_configuration(CONFIG_NAME, list(overrides), run_mode=mode)
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInput(explain(error)) from error
        except Exception as error:  # a YAML file that is none: the reader's errors, and asserts of Hydra's
            told = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"{' '.join(overrides) or CONF} cannot be composed: {told}") from error

    def cell(self, overrides: Sequence[str]) -> Config:
        """Compose one cell.

        Args:
            overrides: One job's overrides, no sweeps among them.

        Raises:
            BadInput: A value of the wrong type, a value that is missing, or an unknown option of a plugin.
        """
        try:
            parsed = [self._parse(text) for text in overrides]
            groups = tuple(o.input_line or "" for o in parsed if o.key_or_group in GROUPS)
            values = [o for o in parsed if o.key_or_group not in GROUPS]
            config = copy.deepcopy(self._groups(groups))
            if config.model.rope_scaling is None and any(_changes_rope_scaling(o) for o in values):
                raise BadInput(
                    f"model.rope_scaling: {config.model.name} has none; other rotary parameters are another "
                    "model, a file of its own in conf/model"
                )
            self._loader._apply_overrides_to_config(values, config)
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInput(explain(error)) from error
        if config.context is not None and any(o.key_or_group == "protocol.context" for o in values):
            raise BadInput("context and protocol.context are two names of one thing: give one")
        return to_config(config)


def to_config(composed: DictConfig) -> Config:
    """The typed cell behind a composed configuration, with `context` moved to where it belongs.

    Raises:
        BadInput: A value is missing or of the wrong type.
    """
    try:
        nodes = {field.name: composed[field.name] for field in dataclasses.fields(Config)}
        values: dict[str, Any] = {
            key: OmegaConf.to_object(node) if OmegaConf.is_config(node) else node for key, node in nodes.items()
        }
    except OmegaConfBaseException as error:
        raise BadInput(explain(error)) from error
    try:  # OmegaConf takes a list or a dictionary wherever a list of texts has one text
        config = from_plain(Config, dataclasses.asdict(Config(**values)))
    except TypeError as error:
        raise BadInput(str(error)) from error
    if config.context is not None:
        config.protocol.context, config.context = config.context, None
    return config


def explain(error: BaseException) -> str:
    """One line that says which key is wrong and why, out of Hydra's chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [type(error).__name__]
    # Of what goes wrong in a file Hydra names the file, and in the next line what.
    first = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0]
    key = getattr(error, "full_key", None)
    parent = getattr(error, "parent_node", None)
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and isinstance(parent, DictConfig):
        add = f"; +{key}=VALUE adds it" if OPEN_KEYS.match(str(key)) else ""
        return f"no key is called {key!r}: {nearest(str(error.key), [str(child) for child in parent])}{add}"
    return f"{key}: {first}" if key and key not in first else first


def _text(key: str, value: Any) -> str:
    """An axis of an experiment as it would be typed: `key=a,b`."""
    values = value if isinstance(value, list) else [value]
    texts = ["null" if one is None else str(one).lower() if isinstance(one, bool) else str(one) for one in values]
    return f"{key}={','.join(texts)}"


def _with(product: dict[str, list[str]], axes: dict[str, list[str]]) -> dict[str, list[str]]:
    """An experiment's axes with those that the call gives in place of the same."""
    given = {SHORT.get(key, key) for key in axes}
    return {key: texts for key, texts in product.items() if SHORT.get(key, key) not in given} | axes


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The full path of every value."""
    for name in map(str, node):
        child: Any = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _changes_rope_scaling(override: Override) -> bool:
    return override.key_or_group.startswith("model.rope_scaling") and override.value() is not None

"""What Hydra lets a call or a file do beyond choosing values: which of it is closed, and which is the user's own.

A configuration is data. Closed, as bad input and before anything starts, wherever it comes from (the command line, a
file in conf/ or in a plugin's folder, an experiment's cells):

- `_target_` under any key of a cell, however it was put together: Hydra calls what it names.
- Hydra's own keys but those of `HYDRA_ALLOWED`. Callbacks, logging handlers and the search path import what they
  name, `hydra.job.env_set` changes the environment, `hydra.output_subdir` writes the overrides down as typed.
- The same by way of a file: an option whose `# @package` or defaults list changes Hydra's own keys.
- A launcher that is no installed plugin of Hydra's, and of its keys all but `LAUNCHER_KEYS`, which say how many cells
  run where. Closed are submitit's `setup`, `python`, `srun_args` and `additional_parameters`, which name what a shell
  runs, the folders out of which submitit and joblib unpickle, and every key of a launcher that rfloor does not know:
  its plugin's own values hold, which no YAML file changes.
- Flags that bring another configuration; `--experimental-rerun` unpickles one.
- The interpreter that a cell runs under: a plugin's class says it, and no option.
- Drivers and plugins in `tracking.uri`, which SQLAlchemy imports, and of what stands behind its ? all but the
  parameters of `registry.validate`: a driver and the libraries below it load what others name.
- Stores of `tracking.artifacts` that MLflow has from a plugin of its own, and hdfs.
- A `cache.folder` of another user's, or one that others may write into: PyTorch, Triton and FlashInfer load what they
  compiled out of it, and PyTorch unpickles there.

Left to the user:

- What is installed. Plugins of rfloor and launchers of Hydra are code, and a call runs those that it names. joblib's
  launcher and others pickle what they send to their own processes; rfloor sends JSON to its.
- The environment. `${oc.env:NAME}` reads it for the call, as `tracking.uri=${oc.env:MLFLOW_TRACKING_URI}` does, and
  Hydra, MLflow, PyTorch and the hub's client read what is theirs: who may set it may set PYTHONPATH too.
- Which of the user's own folders `cache.folder` is, and who may rename the folders above it.
- rfloor's own files, conf/config.yaml among them.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from registry.outcome import BadInput, nearest
from registry.validate import TARGET, naming_code, targets

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

LAUNCHER = "hydra/launcher"
HYDRA_ALLOWED = (LAUNCHER, "hydra.launcher.*", "hydra.verbose")
"""Hydra's own keys that a call may set: which launcher runs the cells and how, and how much Hydra says."""
LAUNCHER_KEYS = (
    *("n_jobs", "backend", "prefer", "require", "verbose", "timeout", "pre_dispatch", "batch_size", "max_nbytes"),
    *("mmap_mode", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name"),
    *("partition", "qos", "account", "constraint", "exclude", "gres", "cpus_per_gpu", "gpus_per_task", "mem_per_gpu"),
    *("mem_per_cpu", "signal_delay_s", "max_num_timeout", "array_parallelism", "comment", "stderr_to_stdout"),
)
"""Keys of joblib's and submitit's launchers that a call may set."""
FOLLOWS = ("overrides", "runtime", "job.override_dirname")
"""Hydra's own keys that follow from what was chosen."""
REFUSED_FLAGS = ("config_path", "config_name", "config_dir", "experimental_rerun")
COMMANDS = ("run", "multirun", "cfg", "info", "shell_completion")
"""Flags of which Hydra takes one."""
SHOWING_FLAGS = ("package", "resolve")
"""Flags that say how `--cfg` shows what it shows."""


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that bring another configuration, or exclude each other, whatever else the call asks for.

    Raises:
        BadInput: There is one.
    """
    for flag in REFUSED_FLAGS:
        if getattr(args, flag):
            raise BadInput(f"--{flag.replace('_', '-')}: rfloor's configuration lies in conf/ and in its plugins")
    for flag in SHOWING_FLAGS:
        if getattr(args, flag) and not args.cfg:
            raise BadInput(f"--{flag} goes with --cfg")
    given = [f"--{flag.replace('_', '-')}" for flag in COMMANDS if getattr(args, flag)]
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} exclude each other: leave out {'-m' if args.multirun else given[0]}")


def check_override(override: Override) -> None:
    """Refuse an override that is more than a value, and one of Hydra's own keys that is closed.

    Raises:
        BadInput: It is.
    """
    text, key = override.input_line or "", override.key_or_group
    if TARGET in text:
        raise BadInput(f"{text}: {naming_code(key)}")
    if override.is_delete():
        raise BadInput(f"{text}: a key cannot be removed; set it to another value")
    if override.package is not None:
        raise BadInput(f"{text}: a group keeps its place, write {key}=OPTION")
    if not override.is_hydra_override():
        return
    if not any(fnmatch.fnmatch(key, allowed) for allowed in HYDRA_ALLOWED):
        raise BadInput(f"{text}: of Hydra's own keys a call may set {', '.join(HYDRA_ALLOWED)}")
    name = key.removeprefix("hydra.launcher.")
    if name != key and name not in LAUNCHER_KEYS:
        raise BadInput(f"{text}: of a launcher's keys a call may set others: {nearest(name, LAUNCHER_KEYS)}")
    if override.is_add() or override.is_force_add():
        raise BadInput(f"{text}: {key} is no key of the launcher's, and none can be added")
    if override.is_sweep_override():
        raise BadInput(f"{text}: Hydra's own keys hold for the whole call and cannot be swept")
    if key == "hydra.verbose" and not _loggers(override.value()):
        raise BadInput(f"{text}: hydra.verbose is true, false, a logger's name or a list of such names")


def check_unchanged(own: Mapping[str, Any], found: Mapping[str, Any], choices: str) -> None:
    """Refuse options whose files change Hydra's own keys.

    Args:
        own: Hydra's node as rfloor sets it.
        found: The same with the options.
        choices: The options, for the message.

    Raises:
        BadInput: Another key than those that follow from the choice is changed.
    """
    changed = sorted(key for key in own.keys() | found.keys() if _rest(key, own) != _rest(key, found))
    if changed:
        told = ", ".join(f"hydra.{key}" for key in changed)
        raise BadInput(f"{choices}: the file of an option chooses values of its group, and this one changes {told}")


def check_launcher(config: DictConfig) -> None:
    """Refuse a launcher that Hydra would not take, or one that is to call something else.

    Raises:
        BadInput: It is no installed plugin, or its configuration names code or changes what only the plugin may say.
        OmegaConfBaseException: A value of its configuration cannot be resolved.
    """
    launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    name = str(launcher.pop(TARGET, None)) if isinstance(launcher, dict) else "nothing"
    known = Plugins.instance().class_name_to_class.get(name)
    told = f"{LAUNCHER}={config.hydra.runtime.choices.get(LAUNCHER)}"
    if known is None or not issubclass(known, Launcher):
        raise BadInput(f"{told} names {name}, which is no installed launcher of Hydra's")
    for key in targets(launcher, "hydra.launcher"):
        raise BadInput(f"{told}: {naming_code(key)}")
    own, found = _own(name), _unresolved(config.hydra.launcher)
    for key, value in launcher.items():
        if key not in LAUNCHER_KEYS and found[key] != own.get(key):
            raise BadInput(f"{told}: what hydra.launcher.{key} is only the launcher's plugin says")
        if key in LAUNCHER_KEYS and not str(value).isprintable():
            raise BadInput(f"{told}: hydra.launcher.{key} is more than a line, and a shell would run the next")


def _own(target: str) -> dict[str, Any]:
    """The configuration that an installed launcher registered for itself."""
    store = ConfigStore.instance()
    nodes = (store.load(f"{LAUNCHER}/{option}").node for option in store.list(LAUNCHER))
    return next((own for own in map(_unresolved, nodes) if own.get(TARGET) == target), {})


def _unresolved(node: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.structured(node) if not OmegaConf.is_config(node) else node)
    return plain if isinstance(plain, dict) else {}


def _rest(key: str, node: Mapping[str, Any]) -> Any:
    """One of Hydra's keys without what follows from a choice."""
    value = node.get(key, "")
    if key in FOLLOWS:
        return None
    return {k: v for k, v in value.items() if f"{key}.{k}" not in FOLLOWS} if isinstance(value, dict) else value


def _loggers(value: Any) -> bool:
    """Whether Hydra can make something of a `hydra.verbose`."""
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return isinstance(value, bool | str)

"""What a measurement depends on, hashed: the identity under which a cell's records lie."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.hardware import physical_cores
from registry.redact import Redactor, environment_secrets
from registry.schema import what_decides, what_is_measured
from registry.weights import RANDOM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from registry.hardware import Device
    from registry.schema import Config

WORKER = "registry.worker"
"""Where the measuring code starts."""
SPELT_OUT = ("execution", "protocol")
"""Groups whose options are names for what stands beside them: they choose no plugin."""
LABELS = ("gpu", "model")
"""Groups whose names no plugin knows: their numbers are told, and what measures is told by the device itself."""
VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_FORCE_PTX_JIT", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_JIT", "PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_TUNABLEOP_ENABLED"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_COMPILE_DISABLE"),
    *("TORCH_LINALG_PREFER_CUSOLVER", "CUDA_SCALE_LAUNCH_QUEUES", "BNB_CUDA_VERSION", "NVCC_APPEND_FLAGS"),
    *("NVCC_PREPEND_FLAGS", "LD_PRELOAD", "GLIBC_TUNABLES"),
)
FAMILIES = (
    *("CUDNN_", "GOMP_", "KMP_", "OMP_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_CUDNN_", "TRITON_"),
    *("FLASHINFER_", "FLASH_ATTENTION_", "MALLOC_"),
)
"""Environment variables by which a library or a compiler makes another step of the same code, by name and by
beginning."""
TELLING = (
    *("KMP_DUPLICATE_LIB_OK", "KMP_SETTINGS", "KMP_VERSION", "KMP_WARNINGS", "OMP_AFFINITY_FORMAT"),
    *("OMP_DISPLAY_AFFINITY", "OMP_DISPLAY_ENV", "TORCHDYNAMO_VERBOSE", "TRITON_PRINT_AUTOTUNING"),
    "FLASHINFER_LOGLEVEL",
)
"""Those of a family by which a library only says more or less of what it does anyway."""
NO_STEPS = ("_DIR", "_PATH", "_FOLDER", "_HOME", "_FILE", "_LOG", "_LOGS", "_THREADS")
"""Ends of those of a family that change none: where something is kept, what is told of it, and how many threads
compile; how many compute rfloor sets itself (`protocol.threads`)."""


def cell_id(
    config: Config,
    device: Device,
    modules: Mapping[str, tuple[str, ...]],
    versions: Mapping[str, str],
    stored: Mapping[str, Any],
    variables: Mapping[str, str],
) -> str:
    """Hash of everything that changes a measurement.

    Args:
        config: The resolved cell. Where its runs and records go, what it is asked for, how often and how long it may
            take, what is looked at once all is timed, and what is only said of it (`registry.schema.NO_FIGURES`) is
            left out; so are secrets, which change no step and which a hash would let others guess.
        device: The device that measures; its name and driver count, not which of several equal ones it is.
        modules: The plugins' modules, each with the files beside it that its steps depend on.
        versions: Installed packages.
        stored: How weights in a folder are stored and what they are (`registry.weights.check_weights`): a folder that
            was written anew is another measurement, and one that was moved is not. Of a hub id the commit.
        variables: Of `step_variables`.

    Returns:
        Sixteen hexadecimal digits.
    """
    identity = {
        "config": Redactor().plain(_deciding(config, device, bool(stored))),
        "sources": {name: source_digest(name, modules.get(name, ())) for name in sorted({WORKER, *modules})},
        "device": [device.kind, device.name, device.driver],
        "versions": dict(versions),
        "weights": dict(stored),
        "variables": dict(variables),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def step_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that are set and change a step, with their values but for secrets."""
    found = {
        name: value
        for name, value in environment.items()
        if name in VARIABLES or (name.startswith(FAMILIES) and not name.endswith(NO_STEPS) and name not in TELLING)
    }
    hidden: dict[str, str] = Redactor(environment_secrets(environment)).plain(found)
    return hidden


def _deciding(config: Config, device: Device, in_folder: bool) -> dict[str, Any]:
    """A cell's configuration in its plain form, but for what is known better or does not count in this cell."""
    plain = what_decides(what_is_measured(config))
    for group in (*SPELT_OUT, *LABELS):
        del plain[group]["name"]
    if device.kind == "cpu":  # a GPU's steps have one thread that launches them
        plain["protocol"]["threads"] = config.protocol.threads or physical_cores()
    if in_folder:
        del plain["model"]["weights"]
    if in_folder or config.model.weights == RANDOM:
        del plain["model"]["revision"]
    if not config.model.rope_scaling:  # of which some reckon with it
        del plain["model"]["max_context"]
    return plain


@cache
def source_digest(module: str, data: tuple[str, ...] = ()) -> str:
    """Hash of a module's source, of all that it imports from its own top-level package, and of files beside it."""
    digest = hashlib.sha256()
    own = _source(module)
    beside = [own.parent / name for name in data] if own else []
    for file in [*sorted(_reachable(module)), *(file for file in beside if file.is_file())]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _reachable(module: str) -> set[Path]:
    package = module.partition(".")[0]
    files: set[Path] = set()
    queue = [module]
    while queue:
        importer = queue.pop()
        file = _source(importer)
        if file is None or file in files:
            continue
        files.add(file)
        for name in _imports(file, importer):
            if name.partition(".")[0] == package:
                queue.append(name)
    return files


def _imports(file: Path, module: str) -> set[str]:
    parents = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    names = {".".join(parents[:depth]) for depth in range(1, len(parents) + 1)}
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # compiled, or broken: the cell's own outcome, told elsewhere
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return names


def _source(module: str) -> Path | None:
    """The file of a module, found without importing it or its parents."""
    package, *rest = module.split(".")
    try:
        spec: Any = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for root in spec.submodule_search_locations or []:
        base = Path(root).joinpath(*rest)
        for file in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None

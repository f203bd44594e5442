"""What is made once and kept: quantised folders of random weights, up to a size, and compiled kernels.

A folder is named by everything that decides its bytes. Whoever uses one holds a shared lock beside it; who wants room
removes those that were used longest ago and that nobody holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from registry.floor import GB, stored_weight_bytes
from registry.identity import source_digest
from registry.synthesis import unfinished, write_checkpoint
from registry.weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from registry.architecture import Architecture
    from registry.checkpoint import CheckpointFormat
    from registry.schema import CacheConfig

CHECKPOINTS = "checkpoints"
KERNELS = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "GPTQMODEL_TORCH_EXTENSIONS_DIR": "gptqmodel",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",  # its own folders are below, by version and architecture
}
"""Environment variables by which runtimes are told where to keep what they compile -> folder in the cache."""


def kernel_environment(cache: CacheConfig, versions: Mapping[str, str]) -> dict[str, str]:
    """Where a worker's runtimes keep their compiled kernels, unless the user's environment says otherwise.

    Args:
        cache: Where.
        versions: Of the Python and the torch that they are compiled for: not all of them look.
    """
    made_for = f"python{versions.get('python', '')}-torch{versions.get('torch', '')}"
    root = Path(cache.folder).expanduser().absolute() / made_for
    return {name: str(root / folder) for name, folder in KERNELS.items()}


@contextmanager
def random_checkpoint(
    cache: CacheConfig,
    architecture: Architecture,
    seed: int,
    form: CheckpointFormat,
    device: str,
    begin: Callable[[], None],
    told: Callable[[str], None],
) -> Iterator[Path]:
    """The folder of an architecture's random weights in a quantised format, written if it is not there.

    Nobody removes it inside the `with`.

    Args:
        cache: Where, and up to which size.
        architecture: The model.
        seed: Of the weights.
        form: The format.
        device: Whose generator makes the weights, and where the codes are computed.
        begin: Called before something is written.
        told: Told what is written.
    """
    root = Path(cache.folder).expanduser() / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    folder = root / _name(architecture, seed, form, device)
    with _lock_file(folder).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # whoever writes the folder holds it alone
        while not folder.is_dir():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                for left in root.glob(f".{folder.name}.*"):
                    shutil.rmtree(left)  # of a process that was killed: this one holds the lock
                begin()
                need = stored_weight_bytes(architecture, 8)  # no format here stores more than a byte a weight
                _make_room(root, cache.limit_gb * GB - need)
                write_checkpoint(folder, architecture, RandomWeights(seed), form, device, told)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(folder)
        yield folder


def _name(architecture: Architecture, seed: int, form: CheckpointFormat, device: str) -> str:
    modules = (type(form).__module__, RandomWeights.__module__, write_checkpoint.__module__)
    decides = {
        "architecture": asdict(architecture),
        "seed": seed,
        "form": form.quantization_config(),
        "device": device,  # the generators differ
        "sources": [source_digest(module) for module in modules],
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    return f"{architecture.name}-{form.method}-{digest}"


def _lock_file(folder: Path) -> Path:
    """The lock of a folder, or of the one that a hidden folder is to become or was."""
    name = folder.name[1:].rpartition(".")[0] if folder.name.startswith(".") else folder.name
    return folder.with_name(f"{name}.lock")


def _make_room(root: Path, limit: float) -> None:
    """Remove folders, the longest unused first, until the others are no larger than `limit` bytes.

    What killed processes left half written or half removed goes first. One process at a time looks.
    """
    with (root / "room.lock").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        found = [(folder, *_age_and_size(folder)) for folder in root.iterdir() if folder.is_dir()]
        total = sum(size for *_, size in found)
        for folder, _, size in sorted(found, key=lambda one: (not _hidden(one[0]), one[1])):
            if total <= limit and not _hidden(folder):
                return
            if _removed(folder):
                total -= size


def _hidden(folder: Path) -> bool:
    return folder.name.startswith(".")


def _age_and_size(folder: Path) -> tuple[float, int]:
    """When a folder was used last, and its bytes; what is being written may get its name meanwhile."""
    try:
        return folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0.0, 0


def _removed(folder: Path) -> bool:
    """Remove a folder, unless somebody holds it."""
    with _lock_file(folder).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Nobody may take half a folder for a whole one.
        shutil.rmtree(folder if _hidden(folder) else folder.rename(unfinished(folder)), ignore_errors=True)
        return True

"""Where a model's tensors come from: a seed, or a folder of safetensors files.

A folder is checked from its configuration and its files' headers, which needs no torch, before any
process is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from registry import files
from registry.architecture import CONFIG_JSON_NAMES, rotary
from registry.checkpoint import INDEX, CheckpointFormat, model_tensors
from registry.outcome import BadInput, Outcome, Refused

if TYPE_CHECKING:
    from torch import Tensor

    from registry.architecture import Architecture

RANDOM = "random"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Ends of names of weights that torch pickled."""
LENGTH_BYTES = 8
"""Of a safetensors header's length, with which a file begins."""
SAMPLE_BYTES = 256
FULL_ATTENTION = "full_attention"
"""In the words of a config.json, to which every family of rfloor attends in each of its layers."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile("[0-9a-f]{40}")


class WeightSource(Protocol):
    """Gives a tensor by its transformers name."""

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any, device: str) -> Tensor:
        """One tensor, new, in `dtype` on `device`.

        Raises:
            Refused: There is none of this name and shape.
        """

    def quantised(self, layer: str, device: str) -> Mapping[str, Tensor]:
        """What stands for a linear layer's `weight`, by the last part of its name; empty where the weight stands.

        Each look reads the tensor anew, as it is stored.
        """


class RandomWeights:
    """Seeded weights, made on the device.

    Each tensor has a generator of its own, seeded by its name: a two-layer cut has the very weights of
    the full model's first two layers, in whatever order they are asked for. The values differ between CPU
    and CUDA generators.

    No part of the model is left without a say. With transformers' usual 0.02 attention is all but uniform and
    norms are all but one, and a wrong position or a forgotten norm drowns in rounding; here a matrix keeps
    the scale of what it multiplies (standard deviation 1 / sqrt(columns)), so that attention picks single
    tokens, and norm weights (around 1) and biases (around 0) are spread by a third.

    Args:
        seed: Together with a tensor's name it determines the tensor on one kind of device.
    """

    VECTOR_STD = 1 / 3

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any, device: str) -> Tensor:
        """See `WeightSource.tensor`; never refuses."""
        import torch

        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        std = self.VECTOR_STD if len(shape) == 1 else shape[1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator)

    def quantised(self, layer: str, device: str) -> Mapping[str, Tensor]:
        """See `WeightSource.quantised`: nothing is."""
        return {}


class FolderWeights:
    """A local folder in the layout of `save_pretrained`: config.json and safetensors, nothing executed.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: file for file in _shards(folder) for name in read_header(file)}

    @property
    def names(self) -> list[str]:
        """Every tensor in the folder."""
        return list(self._files)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any, device: str) -> Tensor:
        """See `WeightSource.tensor`."""
        tensor = self.stored(name, device)
        if tuple(tensor.shape) != shape:
            raise Refused(
                Outcome.UNSUPPORTED,
                f"{name} in {self._files[name]} has shape {tuple(tensor.shape)}, the model wants {shape}",
            )
        return tensor.to(dtype)

    def quantised(self, layer: str, device: str) -> Mapping[str, Tensor]:
        """See `WeightSource.quantised`."""
        leaves = [name.rpartition(".")[2] for name in self._files if name.rpartition(".")[0] == layer]
        return {} if "weight" in leaves else _Layer(self, layer, [leaf for leaf in leaves if leaf != "bias"], device)

    def stored(self, name: str, device: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            Refused: There is none of this name.
        """
        from safetensors import safe_open

        file = self._files.get(name)
        if file is None:
            raise Refused(Outcome.UNSUPPORTED, f"{self.folder} holds no tensor called {name}")
        with safe_open(file, framework="pt", device=device) as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Layer(Mapping[str, "Tensor"]):
    """A quantised layer's tensors, read when they are looked at."""

    source: FolderWeights
    name: str
    leaves: list[str]
    device: str

    def __getitem__(self, leaf: str) -> Tensor:
        if leaf not in self.leaves:
            raise KeyError(leaf)
        return self.source.stored(f"{self.name}.{leaf}", self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


def open_weights(weights: str, revision: str | None, seed: int) -> WeightSource:
    """The source that `model.weights` names; a hub id is downloaded, or found in the hub's cache.

    Args:
        weights: `random`, a local folder, or a hub id.
        revision: Branch, tag or commit of a hub id.
        seed: For random weights.

    Raises:
        Refused: The hub cannot be reached and its cache does not hold the model.
    """
    if weights == RANDOM:
        return RandomWeights(seed)
    if local := _local(weights):
        return FolderWeights(local)
    try:
        folder = _snapshot(weights, revision)
    except Exception as error:  # the hub's client raises dozens of kinds; each means: not here
        first = str(error).partition("\n")[0] or type(error).__name__
        raise Refused(
            Outcome.MISSING_DEPENDENCY,
            f"the weights {weights} are neither cached nor to be had: {first}",
            f"On a machine with network: hf download {weights}",
        ) from error
    return FolderWeights(Path(folder))


def _snapshot(repository: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": ["*.safetensors", "*.json"],
        "ignore_patterns": ["consolidated*"],  # Mistral's repositories hold the same weights a second time
    }
    try:
        return str(snapshot_download(repository, **wanted))
    except Exception:
        # Asked for a commit, the client lists the hub's files even where its cache holds them.
        with contextlib.suppress(Exception):
            return str(snapshot_download(repository, local_files_only=True, **wanted))
        raise


def hub_commit(weights: str, revision: str | None) -> dict[str, str]:
    """The commit that a hub id stands for, told without the network: a branch moves, and the cache with it.

    Args:
        weights: `random`, a local folder, or a hub id.
        revision: Branch, tag or commit of a hub id.

    Returns:
        Empty for weights from elsewhere, and where the hub's cache does not know the revision.
    """
    if weights == RANDOM or _local(weights):
        return {}
    if COMMIT.fullmatch(revision or ""):
        return {"commit": str(revision)}
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE, f"models--{weights.replace('/', '--')}", "refs")
    try:
        told = files.read_text(refs / (revision or "main")).strip()
    except (OSError, ValueError):
        return {}
    return {"commit": told} if COMMIT.fullmatch(told) else {}


def check_weights(weights: str, architecture: Architecture, quant: Any = None) -> dict[str, Any]:
    """Refuse weights that cannot be meant, from names, configuration and headers alone.

    Args:
        weights: `random`, a local folder, or a hub id (of which only the form can be checked here).
        architecture: What the folder has to hold.
        quant: The format that the cell runs, an instance of its plugin.

    Returns:
        How a folder's weights are stored, and what they are: its quantisation settings, the headers by file, and
        each file's `sample`. Empty for weights from elsewhere.

    Raises:
        BadInput: No such folder, no model in it, a truncated or missing file, another architecture, or
            weights quantised in another format.
    """
    if weights == RANDOM:
        return {}
    folder = _local(weights)
    if folder is None:
        if HUB_ID.fullmatch(weights) and not Path(weights).parent.is_dir():
            return {}
        raise BadInput(
            f"model.weights={weights}: no such folder. Give a folder that holds config.json and "
            "*.safetensors, a hub id (owner/name), or random"
        )
    found = check_folder(folder, architecture, quant)
    return {**found, "samples": {shard.name: sample(shard) for shard in _shards(folder)}}


def check_folder(folder: Path, architecture: Architecture, quant: Any = None) -> dict[str, Any]:
    """The checks of `check_weights` on one folder.

    Returns:
        See there; without the samples.

    Raises:
        BadInput: See there.
    """
    config = _read_json(folder / "config.json")
    found = {field: config.get(name) for field, name in CONFIG_JSON_NAMES.items()}
    found |= _rope(config)
    found["tied_embeddings"] = bool(found["tied_embeddings"])
    compared = [(field, value, getattr(architecture, field)) for field, value in found.items()]
    compared += _computation(config, architecture)
    wrong = [f"{name} {value} (wanted {wanted})" for name, value, wanted in compared if value != wanted]
    if wrong:
        raise BadInput(f"{folder} holds another architecture than {architecture.name}: {', '.join(wrong)}")
    form = _form(folder, config, quant)
    headers = {shard.name: read_header(shard) for shard in _shards(folder)}
    present = {name: told for header in headers.values() for name, told in header.items()}
    expected = model_tensors(architecture, form)
    for name in present:
        if name not in expected and not _idle(name, form):
            raise BadInput(f"{folder} holds {name}, for which {architecture.name} has no place")
    for name, stored in expected.items():
        if name not in present:
            raise BadInput(f"{folder} lacks the tensor {name}")
        dtype, shape = present[name]
        if not stored.fits(tuple(shape)):
            raise BadInput(f"{folder}: {name} has shape {tuple(shape)}, {architecture.name} wants {stored}")
        if dtype not in stored.dtypes:
            raise BadInput(f"{folder}: {name} is stored as {dtype}; known: {', '.join(stored.dtypes)}")
    return {"quantised": config.get("quantization_config"), "headers": headers}


def check_biases(source: FolderWeights, architecture: Architecture) -> None:
    """Refuse biases that no layer of the model adds, unless they are zeros, which old converters wrote everywhere.

    Raises:
        Refused: There is one.
    """
    expected = model_tensors(architecture)
    for name in source.names:
        if name.endswith(".bias") and name not in expected and bool(source.stored(name, "cpu").any()):
            raise Refused(
                Outcome.UNSUPPORTED, f"{source.folder} holds {name}, for which {architecture.name} has no place"
            )


def _local(weights: str) -> Path | None:
    """The folder that `model.weights` names, if there is one.

    Raises:
        BadInput: Nothing can be called that.
    """
    try:
        folder = Path(weights).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # a name too long, no such user
        raise BadInput(f"model.weights={weights}: no such folder: {error}") from error


def _form(folder: Path, config: dict[str, Any], quant: Any) -> CheckpointFormat | None:
    """The format of a folder's linear layers, with the folder's settings; `None` if they are unquantised."""
    quantised = config.get("quantization_config")
    reads = quant.method if isinstance(quant, CheckpointFormat) else None
    if not quantised:
        if reads and not hasattr(quant, "convert"):
            raise BadInput(
                f"{folder} holds unquantised weights, and this quant reads folders that are quantised as {reads}: "
                "rfloor synthesize makes one"
            )
        return None
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
    if method != reads:
        wanted = f"{reads} ones" if reads else "unquantised ones, which it converts"
        raise BadInput(f"{folder} holds weights quantised as {method}; this quant reads {wanted}")
    assert isinstance(quant, CheckpointFormat)
    quant.adopt(quantised)
    return quant


def _idle(name: str, form: CheckpointFormat | None) -> bool:
    """Whether a tensor that no model has a place for does no harm."""
    layer, _, leaf = name.rpartition(".")
    if form is not None and (leaf == "bias" or (layer == "lm_head" and form.covers(layer))):
        return True  # a bias of zeros; the head of a tied model, which ExLlamaV2 stores all the same
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of a safetensors file, checked by the library that will load it.

    Raises:
        BadInput: The file is no safetensors file, or shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with files.opened(file):  # or a pipe would be waited for
            pass
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:  # the last: no room to map it
        raise BadInput(f"{file} is truncated or no safetensors file: {error}") from error


def sample(file: Path) -> str:
    """Hash of some bytes from the middle of every tensor of a safetensors file, which `read_header` has checked.

    A copy's is the same, wherever it lies, and another training's is not, at the cost of no more than the header's.
    """
    digest = hashlib.sha256()
    with files.opened(file) as stream:
        begin = LENGTH_BYTES + int.from_bytes(stream.read(LENGTH_BYTES), "little")
        header = json.loads(stream.read(begin - LENGTH_BYTES))
        for name in sorted(header.keys() - {"__metadata__"}):
            first, end = header[name]["data_offsets"]
            stream.seek(begin + max(first, (first + end - SAMPLE_BYTES) // 2))
            digest.update(stream.read(min(SAMPLE_BYTES, end - first)))
    return digest.hexdigest()


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists() and not _keeps_a_stale_index(folder):
        weight_map = _read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise BadInput(f"{index} does not list files of its own folder")
        names = sorted(set(files))
        try:
            missing = [name for name in names if not (folder / name).is_file()]
        except OSError as error:  # of a name too long
            raise BadInput(f"{index} does not list files of its own folder: {error.strerror}") from error
        if missing:
            raise BadInput(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists")
        return [folder / name for name in names]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        why = f": {', '.join(pickled[:3])} would run what is pickled in it" if pickled else ""
        raise BadInput(f"{folder} holds no *.safetensors file; rfloor loads no other kind{why}")
    return shards


def _keeps_a_stale_index(folder: Path) -> bool:
    """ExLlamaV2's converter copies the unquantised model's index beside shards of other names, and reads none."""
    quantised = _read_json(folder / "config.json").get("quantization_config")
    return isinstance(quantised, dict) and quantised.get("quant_method") == "exl2"


def _computation(config: dict[str, Any], architecture: Architecture) -> list[tuple[str, Any, Any]]:
    """What no shape tells of a folder's model: by name what it computes, and what the families of rfloor do."""
    every, none = [FULL_ATTENTION] * architecture.layers, f"none below {architecture.max_context}"
    rope = config.get("rope_parameters")
    given = rope if isinstance(rope, dict) and "partial_rotary_factor" in rope else config
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", architecture.model_type != "qwen2")  # as transformers takes its absence
    free = not used or window is None or (isinstance(window, int) and window >= architecture.max_context)
    return [
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("partial_rotary_factor", given.get("partial_rotary_factor", 1), 1),
        ("layer_types", config.get("layer_types") or every, every),
        ("sliding_window", none if free else window, none),
    ]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary embedding, as transformers 5 writes them or 4 did."""
    both = (config.get("rope_parameters"), config.get("rope_scaling"))
    scaling = rotary(next((given for given in both if isinstance(given, dict)), None)) or {}
    theta = scaling.pop("rope_theta", None)
    if scaling.get("rope_type", "default") == "default":
        scaling = {}
    return {"rope_theta": config.get("rope_theta", theta), "rope_scaling": scaling or None}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read_text(file))
    except FileNotFoundError as error:
        raise BadInput(
            f"{file.parent} has no {file.name}; a model folder has one beside its *.safetensors"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds no JSON object")
    return content

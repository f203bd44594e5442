"""How a quantised checkpoint folder is written: shards, index and config.json around what its format stores."""

from __future__ import annotations

import json
import secrets
import shutil
from typing import TYPE_CHECKING

from registry.checkpoint import INDEX, model_tensors
from registry.outcome import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from registry.architecture import Architecture
    from registry.checkpoint import CheckpointFormat
    from registry.weights import WeightSource

SHARD_BYTES = 2 << 30
"""A shard is written once it holds this much: all that is held in memory of the folder at a time."""


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    source: WeightSource,
    form: CheckpointFormat,
    device: str,
    told: Callable[[str], None],
) -> None:
    """Write a model folder in a quantised format; it is there as a whole or not at all.

    Args:
        folder: Where; must not exist.
        architecture: The model.
        source: Its unquantised weights.
        form: The format.
        device: Where the codes are computed.
        told: Told of each block.

    Raises:
        BadInput: The folder exists.
        OSError: It cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        raise BadInput(f"{folder} exists already; give a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = unfinished(folder)
    building.mkdir()
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(batch, building / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    try:
        dtype = getattr(torch, form.dtype)
        for name, stored in model_tensors(architecture).items():
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and len(stored.shape) == 2 and "embed" not in layer and form.covers(layer):
                weight = source.tensor(name, stored.extents, torch.bfloat16, device)
                batch |= {f"{layer}.{part}": t.cpu().contiguous() for part, t in form.encode(weight, layer).items()}
            else:
                batch[name] = source.tensor(name, stored.extents, dtype, device).cpu()
            if name.endswith("post_attention_layernorm.weight"):
                told(f"block {int(name.split('.')[2]) + 1} of {architecture.layers}")
            if sum(tensor.nbytes for tensor in batch.values()) >= SHARD_BYTES:
                flush()
        flush()
        _name_shards(building, shards)
        config = architecture.transformers_config().to_dict() | {
            "architectures": [f"{architecture.model_type.capitalize()}ForCausalLM"],
            "dtype": form.dtype,
            "torch_dtype": form.dtype,  # transformers 4, ExLlamaV2
            "rope_theta": architecture.rope_theta,  # likewise
            "rope_scaling": dict(architecture.rope_scaling or {}) or None,  # likewise
            "quantization_config": form.quantization_config(),
        }
        (building / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def unfinished(folder: Path) -> Path:
    """A new hidden name beside a folder, under which it is written, or removed."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _name_shards(folder: Path, shards: list[list[str]]) -> None:
    """Give the shards the names that every loader knows, and an index if there is more than one."""
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

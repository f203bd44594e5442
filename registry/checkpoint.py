"""What a quantised checkpoint folder holds: a format says what it stores for a linear layer, the rest is the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from registry.architecture import Architecture

FLOAT_DTYPES = ("BF16", "F16", "F32")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor of a folder.

    Attributes:
        shape: `None` for an extent that the configuration does not tell.
        dtypes: The names that a safetensors header may give its type.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...] = FLOAT_DTYPES

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape, where all of it is known."""
        return tuple(extent for extent in self.shape if extent is not None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor found may be this one."""
        return len(shape) == len(self.shape) and all(w in (None, f) for f, w in zip(shape, self.shape, strict=True))

    def __str__(self) -> str:
        return str(self.shape).replace("None", "any")


class CheckpointFormat(ABC):
    """The half of a quantisation format that folders are read and written by.

    Class variables:
        method: Its name in a config.json, `quantization_config.quant_method`.
        dtype: The torch dtype, by name, of the tensors that stay unquantised.
    """

    method: ClassVar[str]
    dtype: ClassVar[str] = "float16"

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of a folder in this format."""

    @abstractmethod
    def fits(self, architecture: Architecture) -> None:
        """Refuse a model that this format, with its options, cannot store.

        Raises:
            BadInput: An option's value, or a layer's shape.
        """

    @abstractmethod
    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take a folder's own settings over from its `quantization_config`.

        Raises:
            BadInput: Settings that this format, or the kernel that its options name, does not know.
        """

    @abstractmethod
    def layout(self, in_features: int, out_features: int) -> dict[str, Stored]:
        """What stands for a layer's `weight`, by the last part of its name."""

    @abstractmethod
    def encode(self, weight: Tensor, layer: str) -> dict[str, Tensor]:
        """A layer's weight as `layout` says.

        Args:
            weight: `[out_features, in_features]`.
            layer: The layer's transformers name.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that a layer's stored tensors stand for, float32 `[out_features, in_features]`."""

    def covers(self, layer: str) -> bool:
        """Whether a linear layer is stored in this format; most leave the LM head as it is."""
        return layer != "lm_head"


def model_tensors(architecture: Architecture, form: CheckpointFormat | None = None) -> dict[str, Stored]:
    """Name, shape and types of every tensor of a Llama-shaped checkpoint (qwen2, llama, mistral).

    Args:
        architecture: The model.
        form: The format of its linear layers; `None` for unquantised ones.
    """
    a = architecture
    found = {"model.embed_tokens.weight": Stored((a.vocab, a.hidden))}
    for layer in range(a.layers):
        prefix = f"model.layers.{layer}."
        for name, (wide, tall) in a.linear_shapes.items():
            found |= _linear(prefix + name, wide, tall, form)
            if a.qkv_bias and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj"):
                found[f"{prefix}{name}.bias"] = Stored((tall,))
        found[f"{prefix}input_layernorm.weight"] = Stored((a.hidden,))
        found[f"{prefix}post_attention_layernorm.weight"] = Stored((a.hidden,))
    found["model.norm.weight"] = Stored((a.hidden,))
    if not a.tied_embeddings:
        found |= _linear("lm_head", a.hidden, a.vocab, form)
    return found


def expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an unquantised checkpoint."""
    return {name: stored.extents for name, stored in model_tensors(architecture).items()}


def _linear(name: str, wide: int, tall: int, form: CheckpointFormat | None) -> dict[str, Stored]:
    if form is None or not form.covers(name):
        return {f"{name}.weight": Stored((tall, wide))}
    return {f"{name}.{leaf}": stored for leaf, stored in form.layout(wide, tall).items()}

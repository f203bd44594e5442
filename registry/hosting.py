"""The one replacement mechanism: fill a module tree with weights, each linear layer in its format.

The tree is made on the meta device and filled leaf by leaf, so a quantised model never holds more than
one layer unquantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from registry.weights import WeightSource


HEAD = "lm_head"
"""transformers' name of the layer that gives the logits."""


class Converter(Protocol):
    """The half of a linear format that fills a model."""

    @property
    def keeps(self) -> tuple[str, ...]:
        """See `registry.api.LinearFormat.keeps`."""

    def convert(self, linear: nn.Linear) -> nn.Module:
        """See `registry.api.LinearFormat.convert`."""

    def from_tensors(self, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See `registry.api.LinearFormat.from_tensors`."""


def tie(model: nn.Module, embedding: Tensor, linear: Converter) -> dict[str, nn.Module]:
    """Give a tied head the embedding, or a layer of its own where the format wants the head.

    Args:
        model: As `materialize` left it.
        embedding: `[vocab, hidden]`.
        linear: The format.

    Returns:
        The converted head by its name, or nothing.
    """
    import torch

    head = model.get_submodule(HEAD)
    if HEAD in linear.keeps:
        head.weight = torch.nn.Parameter(embedding, requires_grad=False)
        return {}
    head.weight = torch.nn.Parameter(embedding.clone(), requires_grad=False)  # a format may change what it converts
    assert isinstance(head, torch.nn.Linear)
    converted = linear.convert(head)
    model.set_submodule(HEAD, converted)
    return {HEAD: converted}


class Holder(Protocol):
    """The half of a linear format that tells what a layer holds."""

    def stored(self, module: nn.Module) -> list[Tensor]:
        """See `registry.api.LinearFormat.stored`."""

    def dequantize(self, module: nn.Module) -> Tensor:
        """See `registry.api.LinearFormat.dequantize`."""

    def bias(self, module: nn.Module) -> Tensor | None:
        """See `registry.api.LinearFormat.bias`."""


def materialize(
    model: nn.Module,
    source: WeightSource,
    *,
    linear: Converter,
    device: str,
    dtype: Any,
    tied: Collection[str] = (),
) -> dict[str, nn.Module]:
    """Give every meta parameter of `model` its tensor, and every linear layer its format.

    Args:
        model: A tree made under `torch.device("meta")`; changed in place.
        source: Where the tensors come from, by their names in the tree.
        linear: The format for `nn.Linear` layers.
        device: Where the tensors go.
        dtype: What floating-point tensors become.
        tied: Full names of parameters that another one stands for; see `tie`.

    Returns:
        The converted layers, by name.

    Raises:
        Refused: The source lacks a tensor, or the format refuses a layer.
    """
    import torch

    converted = {}
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        kept = name.rpartition(".")[2] in linear.keeps or f"{prefix}weight" in tied
        hosted = isinstance(module, torch.nn.Linear) and not kept
        stored = source.quantised(name, device) if hosted else {}
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and prefix + leaf not in tied and not (stored and leaf == "weight"):
                tensor = source.tensor(prefix + leaf, tuple(parameter.shape), dtype, device)
                setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
        if hosted:
            converted[name] = linear.from_tensors(module, stored) if stored else linear.convert(module)
            model.set_submodule(name, converted[name])
    return converted


def held_tensors(model: nn.Module, converted: Mapping[str, nn.Module], linear: Holder) -> dict[str, Tensor]:
    """What a filled tree holds: of converted layers all that their format stores, of others their parameters.

    Args:
        model: The tree.
        converted: As `materialize` returned them.
        linear: Their format.
    """
    held: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in converted:
            held |= {f"{name}.{index}": tensor for index, tensor in enumerate(linear.stored(module))}
        elif not _inside(name, converted):
            held |= {f"{name}.{leaf}": p for leaf, p in module.named_parameters(recurse=False)}
    return held


def dequantized_tensors(
    model: nn.Module, converted: Mapping[str, nn.Module], linear: Holder
) -> Iterator[tuple[str, Tensor]]:
    """The weights and biases that a filled tree multiplies with, by their names in it.

    Args:
        model: The tree.
        converted: As `materialize` returned them.
        linear: Their format.
    """
    for name, module in model.named_modules():
        if name in converted:
            yield f"{name}.weight", linear.dequantize(module)
            bias = linear.bias(module)
            if bias is not None:
                yield f"{name}.bias", bias
        elif not _inside(name, converted):
            for leaf, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{leaf}", parameter.detach()


def _inside(name: str, converted: Mapping[str, nn.Module]) -> bool:
    """Whether a module is a part of a converted layer, whose tensors its format has already told."""
    parents = name.split(".")
    return any(".".join(parents[:depth]) in converted for depth in range(1, len(parents)))


def streamed_bytes(held: Iterable[Tensor], looked_up: Tensor | None, batch_size: int) -> int:
    """Bytes of weights that a step reads: every storage once, but of a table that is looked up a row a stream.

    Args:
        held: Every weight, the table too.
        looked_up: The input embedding `[vocab, hidden]`, or `None` where it is the head and read in full.
        batch_size: Streams.
    """
    whole = tensor_bytes(held)
    return whole if looked_up is None else whole - looked_up.nbytes + batch_size * looked_up[0].nbytes


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

"""All that a plugin author ever imports.

Three kinds of plugin, each found by an entry point and each a class here: a `Backend` is a whole decode
step, a `LinearFormat` is how one linear layer is stored and multiplied, an `AttentionKernel` is how one
query token attends to the cache. What a class declares in its class variables is read before anything
heavy is imported, so a plugin's module imports torch inside the methods that need it. Every method that
touches tensors is called under `torch.inference_mode()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from registry.architecture import Architecture
from registry.checkpoint import CheckpointFormat, Stored
from registry.hosting import (
    HEAD,
    dequantized_tensors,
    held_tensors,
    materialize,
    streamed_bytes,
    tensor_bytes,
    tie,
)
from registry.outcome import BadInput, Outcome, Refused, nearest, unsupported
from registry.weights import FolderWeights, WeightSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

__all__ = [
    "HEAD",
    "Architecture",
    "AttentionKernel",
    "AttentionShape",
    "Backend",
    "BadInput",
    "CheckpointFormat",
    "FolderWeights",
    "LinearFormat",
    "NoOptions",
    "Outcome",
    "Plugin",
    "Quant",
    "Refused",
    "Request",
    "Requirement",
    "Setup",
    "StepBytes",
    "Stored",
    "WeightSource",
    "dequantized_tensors",
    "held_tensors",
    "materialize",
    "nearest",
    "streamed_bytes",
    "tensor_bytes",
    "tie",
    "unsupported",
]


@dataclass(frozen=True)
class Requirement:
    """A package that a plugin needs.

    Attributes:
        package: Its name on the index, with a version specifier if one matters (`bitsandbytes>=0.50`).
        install: The command that brings it.
    """

    package: str
    install: str


@dataclass(frozen=True)
class NoOptions:
    """The options of a plugin that has none."""


@dataclass(frozen=True)
class Request:
    """The cell that a plugin is asked to serve, told before anything is loaded.

    Attributes:
        architecture: The model.
        backend: Name of the decode body.
        quant: Name of the linear format.
        attention: Name of the attention kernel.
        execution: How the step is launched: `eager`, `cuda_graph` or `compile`.
        cache: `dynamic` (grows by concatenation) or `static` (allocated once at its capacity).
        batch_size: Streams.
        capacity: Tokens that the cache has to hold.
        device: `cpu` or `cuda`.
        capability: CUDA compute capability, `None` on the CPU.
        options: This plugin's own options, an instance of its `Options`.
        quant_options: The linear format's.
        attention_options: The attention kernel's.
        mode: torch.compile's mode, `None` where the step is not compiled.
    """

    architecture: Architecture
    backend: str
    quant: str
    attention: str
    execution: str
    cache: str
    batch_size: int
    capacity: int
    device: str
    capability: tuple[int, int] | None
    options: Any
    quant_options: Any
    attention_options: Any
    mode: str | None = None


class Plugin(ABC):  # noqa: B024 - the kinds below have the abstract methods
    """What all kinds declare.

    Class variables:
        requires: Packages, checked by their metadata; a missing one is the cell's `missing_dependency`.
        devices: Where the plugin runs.
        min_capability: Least CUDA compute capability.
        executions: `eager`; `cuda_graph` if the step can be captured: the position lives on the device and nothing
            in the step needs the host; `compile` if torch.compile comes to the same step, be it in parts.
        caches: Which caches it can work with.
        Options: A dataclass of the plugin's own options; what the configuration gives is checked against it.
        data: Files beside the plugin's module that its steps depend on; part of a cell's identity, as its source is.
    """

    requires: ClassVar[tuple[Requirement, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    min_capability: ClassVar[tuple[int, int] | None] = None
    executions: ClassVar[tuple[str, ...]] = ("eager",)
    caches: ClassVar[tuple[str, ...]] = ("dynamic", "static")
    Options: ClassVar[type] = NoOptions
    data: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """Regular expressions, each of which a kernel of the step has to match, seen by a profiler after the timing.

        A step in which one is missing was done by something else, and is `unsupported`. On the CPU the names are
        those of operators (`aten::mm`).
        """
        return ()

    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        """What `build` compiles, for a message; empty where nothing is compiled."""
        return ""

    @classmethod  # noqa: B027 - most plugins compile nothing
    def build(cls, options: Any, device: str) -> None:
        """Compile what compiles at its first use. Called in the cell's own process, before anything is loaded.

        Raises:
            Exception: What the compiler says ends the cell as `missing_dependency`.
        """

    @classmethod  # noqa: B027 - most plugins have nothing to add
    def check(cls, request: Request) -> None:
        """Refuse a cell for a reason that the class variables cannot say, before anything is loaded.

        Raises:
            Refused: The cell cannot run here; make one with `unsupported(reason, what would work)`.
            BadInput: An option's value cannot be meant, on no machine: the whole call is refused.
        """


class Quant(Plugin):
    """How the weights of linear layers are stored. Made with its options.

    On its own (with `CheckpointFormat`) the storage of a runtime that brings its own body: a backend that names it in
    its `formats` reads it. `LinearFormat` is what any body hosts.
    """

    def __init__(self, options: Any) -> None:
        self.options = options


class LinearFormat(Quant):
    """How one linear layer is stored and multiplied, asked layer by layer."""

    def from_tensors(self, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Make a layer of what a checkpoint holds for it, in a format that reads checkpoints (`CheckpointFormat`).

        Args:
            linear: The layer, its weight on the meta device, its bias where the result has to live.
            tensors: What stands for its weight, by the last part of the name; each look reads it anew.

        Returns:
            As `convert`.

        Raises:
            Refused: The tensors are damaged, or the kernel does not take the layer.
        """
        raise unsupported(f"{type(self).__name__} reads no quantised checkpoint")

    @abstractmethod
    def convert(self, linear: nn.Linear) -> nn.Module:
        """Turn a filled layer into this format.

        Args:
            linear: Weight `[out_features, in_features]` and maybe bias `[out_features]`, on the device on
                which the result has to live, in the model's dtype. May be consumed.

        Returns:
            A module that maps `[..., in_features]` to `[..., out_features]` in the same dtype. A body may overwrite
            what it returns (`backend=fused` turns q in place), so it hands out no buffer that it keeps.

        Raises:
            Refused: The layer's shape does not fit the format.
        """

    @abstractmethod
    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight that `module` multiplies with, `[out_features, in_features]`, in the model's dtype."""

    @property
    def keeps(self) -> tuple[str, ...]:
        """Last parts of the names of linear layers that stay as they are: the head, unless a format wants it."""
        return (HEAD,)

    def bias(self, module: nn.Module) -> Tensor | None:
        """What `module` adds, `[out_features]`, or `None`. The default is the module's attribute `bias`."""
        found: Any = getattr(module, "bias", None)
        return None if found is None else found.detach()

    def stored(self, module: nn.Module) -> list[Tensor]:
        """Every tensor that a multiplication reads, as stored: packed weights, scales, zeros, bias.

        The default is the module's parameters and buffers.
        """
        return [*module.parameters(), *module.buffers()]


@dataclass(frozen=True)
class AttentionShape:
    """What one decode attention looks like.

    Attributes:
        batch_size: Streams.
        q_heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        capacity: Rows of the cache.
        dtype: A torch dtype.
        device: A torch device string.
        cache: `dynamic` or `static`: which of the two kinds of call to prepare for.
    """

    batch_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: Any
    device: str
    cache: str = "static"


class AttentionKernel(Plugin):
    """How one query token attends to the cache. Made with its options, planned once, called every layer.

    Class variables:
        needs_mask: Whether `decode` wants the mask that a body makes once a step for a static cache.
    """

    needs_mask: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    def plan(self, shape: AttentionShape) -> None:
        """Allocate workspaces and compile for a shape. Called once, before the first `decode`.

        Raises:
            Refused: The kernel does not take the shape.
        """

    @abstractmethod
    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kv_len: Tensor | None,
        scale: float,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend with one query token a stream.

        Args:
            q: `[batch, q_heads, 1, head_dim]`, where a model's projection left it: the memory is laid out as
                `[batch, 1, q_heads, head_dim]`.
            k: `[batch, kv_heads, rows, head_dim]`; `rows` is the cache's capacity.
            v: As `k`.
            kv_len: int64, 0-d, on the device: rows that are valid, the new token's included, so two at least. `None`
                when every row is (a dynamic cache).
            scale: Factor on the products of q and k.
            mask: bool `[batch, 1, 1, rows]`, true where a row is valid; given if `needs_mask` and `kv_len` is
                not `None`.

        Returns:
            `[batch, q_heads, 1, head_dim]` in q's dtype, laid out as it likes. Never synchronises with the host.
        """


@dataclass(frozen=True)
class Setup:
    """What a backend is made with.

    Attributes:
        architecture: The model.
        weights: Where its tensors come from, by their transformers names.
        device: `cpu` or `cuda`.
        dtype: The torch dtype of activations, cache and unquantised weights.
        batch_size: Streams.
        cache: `dynamic` or `static`.
        linear: The format that hosts the linear layers, or the storage that the body itself reads.
        attention: The kernel that attends in a decode step.
        options: The backend's own options, an instance of its `Options`.
    """

    architecture: Architecture
    weights: WeightSource
    device: str
    dtype: Any
    batch_size: int
    cache: str
    linear: Any
    attention: AttentionKernel
    options: Any


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step reads from memory.

    Attributes:
        weights: As stored: scales and zeros in, an embedding of which a row is read counted as that row.
        kv: Keys and values of the attended tokens.
    """

    weights: int
    kv: float


class Backend(Plugin):
    """A whole decode step: the body around linear layers and attention.

    Class variables:
        formats: Names of the linear formats it hosts; `None` is any.
        attentions: Names of the attention kernels it hosts; `None` is any.
        hosting: Whether it calls its format's layers and its attention kernel. A runtime with kernels of its own only
            reads what they say, and refuses in `check` what it does not follow.
        environment: The virtual environment that its cells run in, from the checkout's root on; empty is rfloor's
            own. The plugins of such a cell are imported in both. No option says it: what it names is run.
        tags: What every run of it is tagged with, beside what the harness says.
    """

    formats: ClassVar[tuple[str, ...] | None] = None
    attentions: ClassVar[tuple[str, ...] | None] = None
    hosting: ClassVar[bool] = True
    environment: ClassVar[str] = ""
    tags: ClassVar[Mapping[str, str]] = {}

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def load(self, capacity: int) -> None:
        """Bring weights and cache onto the device.

        Args:
            capacity: Tokens that prefill and all steps together may leave in the cache.

        Raises:
            Refused: The weights or the shapes cannot be served.
        """

    @abstractmethod
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Fill the cache from its beginning, whatever it held.

        Args:
            input_ids: int64 `[batch, tokens]`, on the device.

        Returns:
            The last position's logits, `[batch, vocab]`.
        """

    @abstractmethod
    def decode_step(self, token: Tensor) -> Tensor:
        """One token in, the next one's logits out; the cache grows by one.

        Args:
            token: int64 `[batch]`, on the device.

        Returns:
            Logits `[batch, vocab]`. Never synchronises with the host.
        """

    def choose(self, logits: Tensor, token: Tensor) -> None:
        """What a captured step ends with: each stream's choice, the first of its largest logits as in `torch.argmax`.

        Args:
            logits: As `decode_step` gave them.
            token: int64 `[batch]`, which the choices are written into.
        """
        import torch

        torch.argmax(logits, dim=-1, out=token)

    @abstractmethod
    def seek(self, position: int) -> None:
        """Move the end of the cache back to `position` tokens, whose keys and values stay as they are."""

    @abstractmethod
    def position(self) -> int:
        """Tokens in the cache. May synchronise: never called inside a timed window."""

    @abstractmethod
    def bytes_per_step(self, context: float) -> StepBytes:
        """What a step reads that attends to `context` tokens, counted over the tensors really held."""

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Every weight tensor held, as stored, each storage once, by a name of the backend's choice."""

    @abstractmethod
    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight that the step multiplies with, by its transformers name, in the model's dtype.

        The fidelity check loads them into a plain transformers model. A tied LM head may be left out.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop weights, cache and workspaces; the memory is free once the caller collects garbage."""

"""A decode body of our own: one token through kernels that are fused around the step's products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.api import (
    HEAD,
    Backend,
    Requirement,
    StepBytes,
    dequantized_tensors,
    held_tensors,
    materialize,
    streamed_bytes,
    tie,
    unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from backends.fused.tiles import Tiles
    from backends.int4.kernel.launches import Launches
    from registry.api import Request

FAMILIES = ("llama", "mistral", "qwen2")
HEAD_DIMS = (64, 128)
GROUPS = (1, 4, 7, 8)
MOST_STREAMS = 4
ROTARY = ("default", "linear", "llama3", "yarn")
"""Whose angles depend on the position alone, and not on how long the text has become."""
EMBEDDING = "model.embed_tokens.weight"
TOGETHER = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
"""Layers of a block that read the same activations, and so are one product."""
NORMS = ("input_layernorm", "post_attention_layernorm")


class FusedBackend(Backend):
    """Norms, rotary positions, attention and residuals fused around each product, for one to four streams.

    Unquantised weights are multiplied by kernels that read each of them once and do the rest of the block on the way:
    six launches a block. A linear format's layers are called as they are, between kernels that do what is left. Keys
    and values are static, and the position lives on the device.
    """

    requires = (Requirement("triton>=3.6", "a CUDA build of torch brings it"),)
    devices = ("cuda",)
    min_capability = (8, 0)
    executions = ("eager", "cuda_graph")
    caches = ("static",)
    attentions = ("sdpa",)
    data = ("tiles.yaml",)

    model: Any = None
    step: Any = None
    _cache: Any = None
    _weights: Any = None
    _rotation: Any = ()
    _hosts = True

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        a = request.architecture
        refused = [
            f"{what} {value}; it takes {', '.join(map(str, taken))}"
            for what, value, taken in (
                ("the family", a.model_type, FAMILIES),
                ("heads of", a.head_dim, HEAD_DIMS),
                ("query heads a key head:", a.group_size, GROUPS),
                ("streams:", request.batch_size, range(1, MOST_STREAMS + 1)),
                ("rotary positions of type", a.rope_type, ROTARY),
            )
            if value not in taken
        ]
        if refused:
            raise unsupported(f"the fused step does not take {'; nor '.join(refused)}", "Use backend=hf")
        if getattr(request.attention_options, "kernel", "default") != "default":
            raise unsupported(
                "the fused step attends by its own kernel, and the attention asked for pins another",
                "Use attention=sdpa, which here pins none",
            )

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        return ("fused_attend",) if device == "cuda" else ()

    def load(self, capacity: int) -> None:
        """See `Backend.load`."""
        import torch

        from backends.fused.step import Weights
        from backends.fused.tree import rotary, tree
        from backends.int4.product import Int4Linear
        from backends.quant.none import NoQuant

        setup, a = self.setup, self.setup.architecture
        with torch.device("meta"):
            self.model = tree(a).to(setup.dtype)  # which formats that read folders make layers for
        tied = (f"{HEAD}.weight",) if a.tied_embeddings else ()
        filled = {"device": setup.device, "dtype": setup.dtype, "tied": tied}
        self._converted = materialize(self.model, setup.weights, linear=setup.linear, **filled)
        if tied:
            embedding = self.model["model"]["embed_tokens"].weight
            self._converted |= tie(self.model, embedding, setup.linear)
        decoder = self.model["model"]
        self._stacked: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}
        kinds = {type(module) for module in self._converted.values()}
        made: Callable[[int, Any], Any] = _hosted
        if isinstance(setup.linear, NoQuant):  # another format's layer is called, also where it is an nn.Linear
            made, self._converted = self._multiplied, {}
        elif kinds == {Int4Linear} and self.packs():
            made = self._packed
        self._hosts = made is _hosted
        blocks = [made(index, block) for index, block in enumerate(decoder["layers"])]
        self._rotation = rotary(a, capacity, setup.device)
        shape = (2, a.layers, setup.batch_size, a.kv_heads, capacity, a.head_dim)
        self._cache = torch.zeros(shape, dtype=setup.dtype, device=setup.device)
        self._weights = Weights(
            blocks,
            [tuple(block[name].weight for name in NORMS) for block in decoder["layers"]],
            decoder["embed_tokens"].weight,
            decoder["norm"].weight,
            self._head(),
            *self._rotation,
        )
        self.cut(self.tiles(), self.launches())

    def _head(self) -> Any:
        """The head as the step has it: its weight, a packed one, or a format's layer."""
        from backends.int4.product import Int4Linear
        from backends.int4.stacked import alone

        layer = self.model[HEAD]
        if HEAD not in self._converted:
            return layer.weight
        return alone(layer) if isinstance(layer, Int4Linear) and self.packs() else layer

    def packs(self) -> bool:
        """Whether int4 weights go to kernels with the rest fused around them: CUDA C++, with shared memory for it."""
        from backends.int4.kernel.launches import has_room

        a = self.setup.architecture
        widest = max(columns for columns, _ in a.linear_shapes.values())
        return self.setup.device == "cuda" and has_room(self.setup.batch_size, widest)

    def cut(self, tiles: Tiles, launches: Launches) -> None:
        """Make the step with these tiles, its int4 products launched so."""
        from backends.fused.step import Step

        keys, values = self._cache
        self.step = Step(self.setup.architecture, self._weights, keys, values, tiles, launches)

    def launches(self) -> Launches:
        """How the int4 kernel is launched."""
        from backends.int4.kernel.launches import table

        return table()

    def tiles(self) -> Tiles:
        """How the kernels cut their work."""
        from backends.fused.tiles import table

        return table()

    def _multiplied(self, index: int, block: Any) -> Any:
        """A block that the step multiplies itself: what reads the same activations lies in one tensor."""
        from backends.fused.step import Stacked

        found: dict[tuple[str, str], Any] = {}
        for parent, names in TOGETHER.items():
            for leaf in ("weight", "bias"):
                found[parent, leaf] = _stack([block[parent][name] for name in names], leaf)
                if found[parent, leaf] is not None:
                    self._stacked[f"model.layers.{index}.{parent}.{'+'.join(names)}.{leaf}"] = found[parent, leaf]
        return Stacked(
            qkv=found["self_attn", "weight"],
            bias=found["self_attn", "bias"],
            out=block["self_attn"]["o_proj"].weight,
            gate_up=found["mlp", "weight"],
            down=block["mlp"]["down_proj"].weight,
        )

    def _packed(self, index: int, block: Any) -> Any:
        """A block of int4 layers: those that read the same activations become parts of one weight."""
        from backends.fused.step import Stacked
        from backends.int4.stacked import Part, alone, gated, packed, turned

        a, path = self.setup.architecture, f"model.layers.{index}"
        if not self._places:  # the blocks share them
            orders = {"self_attn": turned(a.q_heads + 2 * a.kv_heads, a.head_dim), "mlp": gated(a.ffn)}
            self._places = {parent: order.argsort().to(self.setup.device) for parent, order in orders.items()}
        found = {}
        for parent, names in TOGETHER.items():
            layers = [block[parent][name] for name in names]
            found[parent] = whole = packed(layers, self._places[parent])
            start = 0
            for name, layer in zip(names, layers, strict=True):
                block[parent][name] = self._converted[f"{path}.{parent}.{name}"] = Part(whole, start, layer)
                start += a.linear_shapes[f"{parent}.{name}"][1]
            held = {"words": whole.words, "scales": whole.scales, "bias": whole.bias}
            stem = f"{path}.{parent}.{'+'.join(names)}"
            self._stacked |= {f"{stem}.{leaf}": tensor for leaf, tensor in held.items() if tensor is not None}
        out, down = alone(block["self_attn"]["o_proj"]), alone(block["mlp"]["down_proj"])
        return Stacked(found["self_attn"], None, out, found["mlp"], down)

    def prefill(self, input_ids: Tensor) -> Tensor:
        """See `Backend.prefill`."""
        import torch

        from backends.fused.tree import prefill

        (keys, values), (cos, sin) = self._cache, self._rotation
        logits = prefill(self.model, input_ids, keys, values, cos, sin, self.setup.architecture)
        if self.setup.device == "cuda" and not self._hosts:
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB that no step of ours uses, captured ones included
        self.seek(input_ids.shape[1])
        return logits

    def decode_step(self, token: Tensor) -> Tensor:
        """See `Backend.decode_step`."""
        logits: Tensor = self.step(token)
        return logits

    def choose(self, logits: Tensor, token: Tensor) -> None:
        """See `Backend.choose`."""
        self.step.choose(logits, token)

    def seek(self, position: int) -> None:
        """See `Backend.seek`."""
        self.step.length.fill_(position)

    def position(self) -> int:
        """See `Backend.position`."""
        return int(self.step.length)

    def bytes_per_step(self, context: float) -> StepBytes:
        """See `Backend.bytes_per_step`."""
        a, held = self.setup.architecture, self.weights()
        looked_up = None if a.tied_embeddings and HEAD not in self._converted else held[EMBEDDING]
        weights = streamed_bytes(held.values(), looked_up, self.setup.batch_size)
        return StepBytes(weights, a.kv_bytes_per_token(self._cache.itemsize) * context * self.setup.batch_size)

    def weights(self) -> Mapping[str, Tensor]:
        """See `Backend.weights`."""
        parts = {tensor.untyped_storage().data_ptr() for tensor in self._stacked.values()}
        held = held_tensors(self.model, self._converted, self.setup.linear)
        if self.setup.architecture.tied_embeddings:
            held.pop(f"{HEAD}.weight", None)
        return self._stacked | {n: t for n, t in held.items() if t.untyped_storage().data_ptr() not in parts}

    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """See `Backend.dequantized`."""
        return dequantized_tensors(self.model, self._converted, self.setup.linear)

    def close(self) -> None:
        """See `Backend.close`."""
        self._converted, self._stacked, self._places = {}, {}, {}
        self.model = self.step = self._cache = self._weights = None
        self._rotation = ()


def _hosted(index: int, block: Any) -> Any:
    """A block whose products are its format's layers."""
    from backends.fused.step import Hosted

    attention, mlp = block["self_attn"], block["mlp"]
    return Hosted(
        *(attention[f"{name}_proj"] for name in "qkvo"), *(mlp[f"{name}_proj"] for name in ("gate", "up", "down"))
    )


def _stack(layers: list[Any], leaf: str) -> Tensor | None:
    """One tensor of the layers' weights or biases, which become parts of it; `None` where they have none."""
    import torch

    tensors = [getattr(layer, leaf) for layer in layers]
    if tensors[0] is None:
        return None
    stacked = torch.cat(tensors)
    for layer, part in zip(layers, torch.split(stacked, [len(tensor) for tensor in tensors]), strict=True):
        setattr(layer, leaf, torch.nn.Parameter(part, requires_grad=False))
    return stacked

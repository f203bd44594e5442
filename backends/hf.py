"""transformers' own model as the decode body: what most people run, and what the study measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backends.hf_attention import Installed, install
from registry.api import (
    HEAD,
    Backend,
    StepBytes,
    dequantized_tensors,
    held_tensors,
    materialize,
    streamed_bytes,
    tie,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

EMBEDDING = "model.embed_tokens.weight"


class HfBackend(Backend):
    """A causal LM of transformers on a dynamic or a static cache of its own.

    The model is made on the meta device from the architecture's numbers and filled layer by layer. Its
    forward is transformers' code; the linear format and the decode attention are ours to choose.
    """

    executions = ("eager", "cuda_graph", "compile")

    model: Any = None
    cache: Any = None
    _attention: Installed | None = None

    def load(self, capacity: int) -> None:
        """See `Backend.load`."""
        import torch
        from transformers import AutoModelForCausalLM

        setup = self.setup
        self.config = setup.architecture.transformers_config()
        self._attention = install(setup, capacity)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=setup.dtype, attn_implementation=self._attention.name
            )
        tied = setup.architecture.tied_embeddings
        self._converted = materialize(
            model,
            setup.weights,
            linear=setup.linear,
            device=setup.device,
            dtype=setup.dtype,
            tied=(f"{HEAD}.weight",) if tied else (),
        )
        if tied:
            self._converted |= tie(model, model.model.embed_tokens.weight, setup.linear)
        _fill_buffers(model, setup.device)
        self.model = model.eval()
        self._capacity = capacity
        self.cache = self._new_cache()

    def _new_cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        a = self.setup.architecture
        if self.setup.cache == "dynamic":
            return DynamicCache(config=self.config)
        cache = StaticCache(config=self.config, max_cache_len=self._capacity)
        cache.early_initialization(
            batch_size=self.setup.batch_size,
            num_heads=a.kv_heads,
            head_dim=a.head_dim,
            dtype=self.setup.dtype,
            device=self.setup.device,
        )
        assert self._attention is not None
        self._attention.cache = cache
        return cache

    def prefill(self, input_ids: Tensor) -> Tensor:
        """See `Backend.prefill`."""
        if self.setup.cache == "dynamic":
            self.cache = self._new_cache()
        else:
            self.seek(0)
        return self._forward(input_ids)

    def decode_step(self, token: Tensor) -> Tensor:
        """See `Backend.decode_step`."""
        return self._forward(token[:, None])

    def _forward(self, input_ids: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def seek(self, position: int) -> None:
        """See `Backend.seek`."""
        if self.setup.cache == "dynamic":
            surplus = self.position() - position
            if surplus:
                self.cache.crop(-surplus)
        else:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(position)

    def position(self) -> int:
        """See `Backend.position`."""
        return int(self.cache.get_seq_length())

    def bytes_per_step(self, context: float) -> StepBytes:
        """See `Backend.bytes_per_step`."""
        a, held = self.setup.architecture, self.weights()
        looked_up = None if a.tied_embeddings and HEAD not in self._converted else held[EMBEDDING]
        weights = streamed_bytes(held.values(), looked_up, self.setup.batch_size)
        keys = self.cache.layers[0].keys
        return StepBytes(weights, a.kv_bytes_per_token(keys.element_size()) * context * self.setup.batch_size)

    def weights(self) -> Mapping[str, Tensor]:
        """See `Backend.weights`."""
        held = held_tensors(self.model, self._converted, self.setup.linear)
        if self.setup.architecture.tied_embeddings:
            held.pop(f"{HEAD}.weight", None)
        return held

    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """See `Backend.dequantized`."""
        return dequantized_tensors(self.model, self._converted, self.setup.linear)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._attention:
            self._attention.remove()
        self._converted = {}
        self.model = self.cache = None


def _fill_buffers(model: nn.Module, device: str) -> None:
    """Give the buffers that transformers computes rather than loads (rotary frequencies) their values."""
    import torch

    for module in model.modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if buffers:
            init: Any = model._init_weights
            init(module)

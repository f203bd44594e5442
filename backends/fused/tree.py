"""The model as a tree of layers under transformers' names, and its prefill: plain torch on the step's own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import Architecture


def tree(a: Architecture) -> Any:
    """The layers of an architecture, to be made on the meta device.

    Returns:
        A module whose parameters have the names that they have in transformers.
    """
    from torch.nn import Embedding, Linear, ModuleDict, ModuleList, RMSNorm

    def block() -> ModuleDict:
        parts: dict[str, ModuleDict] = {"self_attn": ModuleDict(), "mlp": ModuleDict()}
        for path, (columns, rows) in a.linear_shapes.items():
            parent, _, name = path.rpartition(".")
            biased = a.qkv_bias and name in ("q_proj", "k_proj", "v_proj")
            parts[parent][name] = Linear(columns, rows, bias=biased)
        norms = {name: RMSNorm(a.hidden, a.rms_norm_eps) for name in ("input_layernorm", "post_attention_layernorm")}
        return ModuleDict({**parts, **norms})

    decoder = {
        "embed_tokens": Embedding(a.vocab, a.hidden),
        "layers": ModuleList(block() for _ in range(a.layers)),
        "norm": RMSNorm(a.hidden, a.rms_norm_eps),
    }
    return ModuleDict({"model": ModuleDict(decoder), "lm_head": Linear(a.hidden, a.vocab, bias=False)})


def rotary(a: Architecture, capacity: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair, float32 `[capacity, head_dim / 2]`."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made = LlamaRotaryEmbedding(a.transformers_config())
    angles = torch.arange(capacity).float()[:, None] * made.inv_freq.float()
    factor = made.attention_scaling
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def prefill(
    model: Any, input_ids: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, architecture: Architecture
) -> Tensor:
    """Read a prompt from position 0 on.

    Args:
        model: The tree, filled.
        input_ids: int64 `[batch, tokens]`.
        keys: `[layers, batch, kv_heads, capacity, head_dim]`: the prompt's rows are written.
        values: As `keys`.
        cos: As `rotary` gives it.
        sin: As `rotary` gives it.
        architecture: Of the model.

    Returns:
        The last position's logits, float32 `[batch, vocab]`.
    """
    from torch.nn.functional import scaled_dot_product_attention, silu

    tokens, width = input_ids.shape[1], architecture.head_dim
    rotation = cos[:tokens], sin[:tokens]
    x = model["model"]["embed_tokens"](input_ids)
    for index, block in enumerate(model["model"]["layers"]):
        layer, h = block["self_attn"], block["input_layernorm"](x)
        # Each [batch, heads, tokens, head_dim]
        q, k, v = (
            layer[name](h).unflatten(-1, (-1, width)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        keys[index, :, :, :tokens], values[index, :, :, :tokens] = k, v
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + layer["o_proj"](out.transpose(1, 2).flatten(2))
        mlp, h = block["mlp"], block["post_attention_layernorm"](x)
        x = x + mlp["down_proj"](silu(mlp["gate_proj"](h)).mul_(mlp["up_proj"](h)))
    logits: Tensor = model["lm_head"](model["model"]["norm"](x[:, -1]))
    return logits.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of `[batch, heads, tokens, head_dim]`, halves paired as transformers does."""
    import torch

    one, two = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)

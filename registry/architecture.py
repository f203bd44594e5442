"""The numbers that define a decoder-only GQA transformer, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from registry.schema import ModelConfig

# What `transformers` calls each number in a model's config.json.
CONFIG_JSON_NAMES = {
    "model_type": "model_type",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "q_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}


def rotary(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rotary parameters under today's names: in older folders `rope_type` is called `type`."""
    named = {"rope_type" if name == "type" else name: value for name, value in (scaling or {}).items()}
    return named or None


@dataclass(frozen=True)
class Architecture:
    """One architecture, without weights.

    Attributes:
        name: rfloor's name for it, for messages and records.
        model_type: The name under which transformers builds it (`qwen2`, `llama`, `mistral`).
        layers: Decoder blocks.
        hidden: Width of the residual stream.
        q_heads: Query heads.
        kv_heads: Key and value heads; divides `q_heads` (grouped-query attention).
        head_dim: Width of one head.
        ffn: Width of the SwiGLU's inner layer.
        vocab: Rows of the embedding.
        max_context: Largest position the model was made for, in tokens.
        rope_theta: Base of the rotary embedding.
        rope_scaling: Further rotary parameters as transformers names them (`rope_type`, `factor`, ...); `type`, as
            the first was called, becomes `rope_type`.
        rms_norm_eps: Epsilon of every RMSNorm.
        qkv_bias: Whether the q, k and v projections have a bias.
        tied_embeddings: Whether the LM head is the embedding.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int
    rope_theta: float
    rms_norm_eps: float
    qkv_bias: bool
    tied_embeddings: bool
    rope_scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_scaling", rotary(self.rope_scaling))

    @classmethod
    def of(cls, model: ModelConfig) -> Architecture:
        """The architecture behind a model's configuration."""
        numbers = asdict(model)
        return cls(**{f.name: numbers[f.name] for f in fields(cls)})

    @property
    def rope_type(self) -> str:
        """Which rotary embedding it has, as transformers names it."""
        return str((self.rope_scaling or {}).get("rope_type", "default"))

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding alone."""
        return self.vocab * self.hidden

    @property
    def block_parameters(self) -> int:
        """Parameters of one decoder block, its two norms included."""
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden
        bias = q + 2 * kv if self.qkv_bias else 0
        return attention + bias + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, as the study counts them: embedding, blocks, final norm, LM head unless tied."""
        heads = 1 if self.tied_embeddings else 2
        return heads * self.embedding_parameters + self.layers * self.block_parameters + self.hidden

    @property
    def streamed_parameters(self) -> int:
        """Parameters that a decode step reads: all but an input embedding of which one row is read."""
        return self.parameters - (0 if self.tied_embeddings else self.embedding_parameters)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of a block's linear layers, by their transformers names inside it."""
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, q),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (q, self.hidden),
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of keys and values that one cached token takes over all layers, at batch 1."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    def cut(self, layers: int) -> Architecture:
        """The same architecture with fewer blocks: what the fidelity check runs."""
        return replace(self, layers=min(layers, self.layers))

    def transformers_config(self) -> Any:
        """The transformers configuration of this architecture, with nothing left to its defaults.

        Returns:
            A `PreTrainedConfig` of `model_type`.

        Raises:
            ValueError: transformers does not know `model_type`.
        """
        from transformers import AutoConfig, __version__

        rope = {"rope_type": "default", "rope_theta": self.rope_theta, **dict(self.rope_scaling or {})}
        rotary: dict[str, Any] = {"rope_parameters": rope}
        if int(__version__.partition(".")[0]) < 5:  # where abandoned runtimes live
            rotary = {"rope_theta": self.rope_theta, "rope_scaling": dict(self.rope_scaling or {}) or None}
        config = AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.q_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            vocab_size=self.vocab,
            max_position_embeddings=self.max_context,
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.tied_embeddings,
            **rotary,
            # The study's models attend to the whole cache; transformers' Mistral defaults to a window.
            sliding_window=None,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        if self.model_type == "llama":
            config.attention_bias = self.qkv_bias
        return config

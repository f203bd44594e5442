"""A decode body written out in plain torch, for the Llama-shaped families: to be read, and to start from.

One forward serves prefill and step. The cache is one tensor of fixed size and the position lives on the
device, so nothing in a step asks the host and the step can be captured into a CUDA graph. The linear layers
are hosted in whatever format the cell names, a step's attention in whatever kernel it names.
"""

from registry.api import AttentionShape, Backend, StepBytes, materialize, tensor_bytes, unsupported

FAMILIES = ("qwen2", "llama", "mistral")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class PlainBackend(Backend):
    """Embedding, RMSNorm, rotary positions, grouped-query attention, SwiGLU, head; nothing fused."""

    executions = ("eager", "cuda_graph")
    caches = ("static",)

    @classmethod
    def check(cls, request):
        """Refuse what `_forward` does not compute."""
        a = request.architecture
        if a.model_type not in FAMILIES or a.rope_scaling:
            raise unsupported(
                f"the plain body computes {', '.join(FAMILIES)} without rotary scaling, not {a.name}",
                "Use backend=hf",
            )

    def load(self, capacity):
        """Make the tree of layers without storage, then let `materialize` fill it from the weights."""
        import torch

        s, a = self.setup, self.setup.architecture
        s.attention.plan(AttentionShape(s.batch_size, a.q_heads, a.kv_heads, a.head_dim, capacity, s.dtype, s.device))
        with torch.device("meta"):
            self.model = tree(a)
        names = [name for name, _ in self.model.named_parameters()]
        tied = (HEAD,) if a.tied_embeddings else ()
        self.linears = materialize(self.model, s.weights, linear=s.linear, device=s.device, dtype=s.dtype, tied=tied)
        if a.tied_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        # What is no converted layer's: embedding, norms, head.
        self.others = [n for n in names if n.rpartition(".")[0] not in self.linears and n not in tied]
        # [layers, keys and values, batch, kv_heads, capacity, head_dim]
        shape = (a.layers, 2, s.batch_size, a.kv_heads, capacity, a.head_dim)
        self.cache = torch.zeros(shape, dtype=s.dtype, device=s.device)
        self.length = torch.zeros((), dtype=torch.int64, device=s.device)
        self.rows = torch.arange(capacity, device=s.device)
        self.frequencies = a.rope_theta ** -(torch.arange(0, a.head_dim, 2, device=s.device) / a.head_dim)

    def prefill(self, input_ids):
        """`[batch, tokens]` into an empty cache."""
        self.seek(0)
        return self._forward(input_ids)

    def decode_step(self, token):
        """`[batch]`, one token a stream."""
        return self._forward(token[:, None])

    def _forward(self, input_ids):
        s, tokens = self.setup, input_ids.shape[1]
        positions = self.length + self.rows[:tokens]
        self.length.add_(tokens)
        angles = (positions[:, None] * self.frequencies).repeat(1, 2)  # [tokens, head_dim], float32
        rotation = angles.cos().to(s.dtype), angles.sin().to(s.dtype)
        mask = None
        if tokens == 1 and s.attention.needs_mask:
            mask = (self.rows < self.length).expand(s.batch_size, 1, 1, -1)

        x = self.model.model.embed_tokens(input_ids)  # [batch, tokens, hidden]
        for block, cache in zip(self.model.model.layers, self.cache, strict=True):
            x = x + self._attention(block.self_attn, block.input_layernorm(x), cache, positions, rotation, mask)
            x = x + swiglu(block.mlp, block.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x[:, -1]))

    def _attention(self, layer, x, cache, positions, rotation, mask):
        from torch.nn.functional import scaled_dot_product_attention

        width = self.setup.architecture.head_dim
        # Each [batch, heads, tokens, head_dim]
        q, k, v = (
            project(x).unflatten(-1, (-1, width)).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        keys, values = cache
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        if len(positions) == 1:
            out = self.setup.attention.decode(q, keys, values, kv_len=self.length, scale=width**-0.5, mask=mask)
        else:  # the cache was empty: the prompt attends to itself
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return layer.o_proj(out.transpose(1, 2).flatten(2))

    def seek(self, position):
        """Rows from `position` on are overwritten before they are read again."""
        self.length.fill_(position)

    def position(self):
        """Tokens in the cache."""
        return int(self.length)

    def bytes_per_step(self, context):
        """All weights, of an embedding that is not the head one row a stream; the attended keys and values."""
        a, s, held = self.setup.architecture, self.setup, self.weights()
        weights = tensor_bytes(held.values())
        if not a.tied_embeddings:
            embedding = held[EMBEDDING]
            weights += s.batch_size * embedding[0].nbytes - embedding.nbytes
        return StepBytes(weights, a.kv_bytes_per_token(self.cache.itemsize) * context * s.batch_size)

    def weights(self):
        """The others by name, the formats' tensors by layer and number."""
        held = {name: self.model.get_parameter(name) for name in self.others}
        for name, module in self.linears.items():
            held |= {f"{name}.{i}": tensor for i, tensor in enumerate(self.setup.linear.stored(module))}
        return held

    def dequantized(self):
        """Every weight under its transformers name."""
        for name in self.others:
            yield name, self.model.get_parameter(name).detach()
        for name, module in self.linears.items():
            yield f"{name}.weight", self.setup.linear.dequantize(module)
            if getattr(module, "bias", None) is not None:
                yield f"{name}.bias", module.bias.detach()

    def close(self):
        """Let go of every tensor."""
        self.linears = {}
        self.model = self.cache = self.length = self.rows = self.frequencies = None


def tree(a):
    """The layers of architecture `a`, under the names that its weights have in transformers."""
    from torch.nn import Embedding, Linear, ModuleDict, ModuleList, RMSNorm

    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim

    def block():
        attention = {
            "q_proj": Linear(a.hidden, q, bias=a.qkv_bias),
            "k_proj": Linear(a.hidden, kv, bias=a.qkv_bias),
            "v_proj": Linear(a.hidden, kv, bias=a.qkv_bias),
            "o_proj": Linear(q, a.hidden, bias=False),
        }
        mlp = {
            "gate_proj": Linear(a.hidden, a.ffn, bias=False),
            "up_proj": Linear(a.hidden, a.ffn, bias=False),
            "down_proj": Linear(a.ffn, a.hidden, bias=False),
        }
        return ModuleDict(
            {
                "self_attn": ModuleDict(attention),
                "mlp": ModuleDict(mlp),
                "input_layernorm": RMSNorm(a.hidden, a.rms_norm_eps),
                "post_attention_layernorm": RMSNorm(a.hidden, a.rms_norm_eps),
            }
        )

    decoder = {
        "embed_tokens": Embedding(a.vocab, a.hidden),
        "layers": ModuleList(block() for _ in range(a.layers)),
        "norm": RMSNorm(a.hidden, a.rms_norm_eps),
    }
    return ModuleDict({"model": ModuleDict(decoder), "lm_head": Linear(a.hidden, a.vocab, bias=False)})


def rotate(x, cos, sin):
    """Rotary position embedding of `[batch, heads, tokens, head_dim]`, halves paired as transformers does."""
    import torch

    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


def swiglu(mlp, x):
    """The gated inner layer."""
    from torch.nn.functional import silu

    return mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))

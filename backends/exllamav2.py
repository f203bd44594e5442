"""ExLlamaV2's own model, cache and step, on EXL2 and GPTQ folders."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.attention.sdpa import KERNELS
from backends.quant.layouts import in_order
from registry.api import (
    Backend,
    FolderWeights,
    Outcome,
    Refused,
    Requirement,
    StepBytes,
    streamed_bytes,
    unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from registry.api import Request

EMBEDDING = "model.embed_tokens"
UNPLANNED = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
"""PyTorch's SDPA kernels but cuDNN's, which plans anew for every length of the cache and is PyTorch's first choice on
Hopper: on one H200 (2026-11-22, qwen2.5-7b, context 2048) 40 ms a step over lengths not met before, 5 ms over the
same again, with EXL2 as with GPTQ. attention=sdpa-cudnn asks for it all the same."""
AGREEMENT = 0.9999
"""Least cosine between ExLlamaV2's reconstruction of a weight and our decoder's: float16 against float32."""
SCALES = ("scales", "q_scale_max")
FIRST = "model.layers.0.mlp.down_proj"
CHUNK = 2048
"""Tokens that ExLlamaV2 reads at a time in a prefill."""


class ExLlamaV2Backend(Backend):
    """What a user of ExLlamaV2 runs, with two things set right for one stream on one GPU.

    The embedding is moved to the GPU, where ExLlamaV2 leaves it on the host, and a GPTQ folder whose groups run in
    order is read without its `g_idx`, which would send every product down the path for activation order. The cache is
    allocated once and its valid rows are attended to; its length lives on the host, so the step cannot be captured.
    """

    requires = (Requirement("exllamav2>=0.3.2,<0.4", "pip install -e '.[exl2]'"),)
    devices = ("cuda",)
    executions = ("eager",)
    formats = ("exl2", "gptq")
    attentions = ("sdpa",)
    hosting = False

    model: Any = None
    cache: Any = None

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        kernel = getattr(request.quant_options, "kernel", "auto")
        if kernel != "auto":
            raise unsupported(
                f"ExLlamaV2 multiplies by its own kernel, and quant.options.kernel={kernel} asks for another",
                "Use quant=gptq, or backend=hf",
            )

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        return ("gemm_half_q_half",)

    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        """See `Plugin.builds`."""
        return "ExLlamaV2's extension"

    @classmethod
    def build(cls, options: Any, device: str) -> None:
        """See `Plugin.build`: ExLlamaV2 compiles its extension when it is imported.

        PyTorch guards a build by a file that a killed process leaves behind, and waits for it for ever.
        """
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ""), "exllamav2_ext")
        if not folder.is_absolute():
            import exllamav2

            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            import exllamav2  # noqa: F401

    def load(self, capacity: int) -> None:
        """See `Backend.load`."""
        from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config
        from torch.nn.attention import SDPBackend

        setup = self.setup
        if not isinstance(setup.weights, FolderWeights):
            raise unsupported("ExLlamaV2 reads folders", "Use model.weights=DIR")
        if not setup.weights.quantised(FIRST, "cpu"):
            raise unsupported(
                f"{setup.weights.folder} is unquantised, and ExLlamaV2 would multiply it as it is",
                "rfloor synthesize model=... model.weights=DIR quant=gptq out=DIR2 makes a folder that it reads",
            )
        config = ExLlamaV2Config()
        config.model_dir = str(setup.weights.folder)
        config.prepare()
        config.num_hidden_layers = setup.architecture.layers
        config.max_seq_len = capacity
        config.max_batch_size = setup.batch_size
        config.max_input_len = min(CHUNK, capacity)
        self._set_rotary(config)
        config.no_flash_attn = config.no_xformers = True  # attention=sdpa is what is asked for
        self.model = ExLlamaV2(config)
        self._drop_sequential_g_idx()
        self._check_tensors()
        self.model.load()
        embedding = self.model.modules[0]
        embedding.embedding.weight.data = embedding.embedding.weight.data.to(setup.device)
        embedding.device_idx = 0
        pinned = KERNELS[setup.attention.options.kernel]
        self._kernels = [getattr(SDPBackend, name) for name in ((pinned,) if pinned else UNPLANNED)]
        self.cache = ExLlamaV2Cache(self.model, batch_size=setup.batch_size, max_seq_len=capacity)

    def _set_rotary(self, config: Any) -> None:
        """Tell ExLlamaV2 the rotary embedding: it reads what transformers 4 wrote of it, not what 5 writes."""
        a = self.setup.architecture
        scaling = dict(a.rope_scaling or {})
        if a.rope_type not in ("default", "llama3"):
            raise unsupported(
                f"rfloor tells ExLlamaV2 of plain and of llama3's rotary embeddings, not of {a.rope_type}"
            )
        config.rotary_embedding_base = a.rope_theta
        config.scale_pos_emb, config.alt_rope_method = 1.0, None
        if a.rope_type == "llama3":
            config.alt_rope_method = "llama3"
            config.l3_rope_factor = scaling["factor"]
            config.l3_rope_low_freq_factor = scaling["low_freq_factor"]
            config.l3_rope_high_freq_factor = scaling["high_freq_factor"]
            config.l3_rope_original_max_position_embeddings = scaling["original_max_position_embeddings"]

    def _drop_sequential_g_idx(self) -> None:
        """Leave out of the folder's index what says nothing: groups that follow each other as their rows do."""
        assert isinstance(self.setup.weights, FolderWeights)
        files, linear = self.model.config.tensor_file_map, self.setup.linear
        for name in [name for name in files if name.endswith(".g_idx")]:
            if in_order(self.setup.weights.stored(name, "cpu"), linear.group_size):
                del files[name]

    def _check_tensors(self) -> None:
        """Refuse what ExLlamaV2 would fail on: it hands biases to its kernels as they are stored, and any scale."""
        import torch

        assert isinstance(self.setup.weights, FolderWeights)
        for name in self.model.config.tensor_file_map:
            layer, _, leaf = name.rpartition(".")
            if leaf in SCALES and not bool(self.setup.weights.stored(name, "cpu").isfinite().all()):
                raise unsupported(f"the checkpoint is damaged: {name} has a scale that is infinite or no number")
            if leaf == "bias" and f"{layer}.weight" not in self.model.config.tensor_file_map:
                dtype = self.setup.weights.stored(name, "cpu").dtype
                if dtype != torch.float16:
                    raise unsupported(f"ExLlamaV2 takes biases in float16; {name} is stored as {dtype}")

    def prefill(self, input_ids: Tensor) -> Tensor:
        """See `Backend.prefill`: all but the last token, then that one as a step, as ExLlamaV2's generators do it."""
        self.seek(0)
        # Without flash-attn ExLlamaV2 0.3.2 would take SDPA and give it no causal mask (attn.py, _attn_torch: the
        # mask of packed sequences stands where the causal one should). Its own matmuls are given the right one.
        self.model.config.no_sdpa = True
        try:
            if input_ids.shape[1] > 1:
                self.model.forward(input_ids[:, :-1], self.cache, preprocess_only=True)
        finally:
            self.model.config.no_sdpa = False
        return self.decode_step(input_ids[:, -1])

    def decode_step(self, token: Tensor) -> Tensor:
        """See `Backend.decode_step`."""
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self._kernels):
            logits: Tensor = self.model.forward(token[:, None].contiguous(), self.cache)
        return logits[:, -1, : self.setup.architecture.vocab]

    def seek(self, position: int) -> None:
        """See `Backend.seek`."""
        self.cache.current_seq_len = position

    def position(self) -> int:
        """See `Backend.position`."""
        return int(self.cache.current_seq_len)

    def bytes_per_step(self, context: float) -> StepBytes:
        """See `Backend.bytes_per_step`."""
        a, held = self.setup.architecture, self.weights()
        embedding = held[f"{EMBEDDING}.weight"]  # never the head's own: ExLlamaV2 loads a tied one twice
        weights = streamed_bytes(held.values(), embedding, self.setup.batch_size)
        return StepBytes(weights, a.kv_bytes_per_token(2) * context * self.setup.batch_size)

    def _modules(self) -> Iterator[tuple[str, Any]]:
        """Everything that holds weights, by its transformers name."""
        queue = list(self.model.modules)
        while queue:
            module = queue.pop(0)
            queue = [*module.submodules, *queue]
            yield module.key, module

    def weights(self) -> Mapping[str, Tensor]:
        """See `Backend.weights`."""
        held: dict[str, Tensor] = {}
        for name, module in self._modules():
            for leaf, tensor in _tensors(module).items():
                held[f"{name}.{leaf}"] = tensor
        return held

    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """See `Backend.dequantized`: ExLlamaV2's own reconstruction, once it agrees with our decoder's."""
        from exllamav2.linear import ExLlamaV2Linear
        from torch.nn.functional import cosine_similarity

        source, dtype = self.setup.weights, self.setup.dtype
        for name, module in self._modules():
            if not (isinstance(module, ExLlamaV2Linear) and module.q_handle):
                for leaf, tensor in _tensors(module).items():
                    yield f"{name}.{leaf}", tensor.to(dtype)
                continue
            weight = self._as_stored(name, module.get_weight_tensor_dq()).T
            ours = self.setup.linear.decode(source.quantised(name, self.setup.device))
            agreement = float(cosine_similarity(weight.float().flatten(), ours.flatten(), dim=0))
            if not agreement >= AGREEMENT:
                raise Refused(
                    Outcome.INCORRECT,
                    f"ExLlamaV2 reconstructs {name} to a cosine of {agreement:.5f} with rfloor's own decoder; "
                    f"{AGREEMENT} is the least",
                )
            yield f"{name}.weight", weight.to(dtype)
            if "bias" in module.q_tensors:
                yield f"{name}.bias", module.q_tensors["bias"].to(dtype)

    def _as_stored(self, name: str, weight: Tensor) -> Tensor:
        """A weight `[in, out]` with its features in the model's order.

        ExLlamaV2 keeps the inner features of an EXL2 block's MLP in the order in which down_proj stores them.
        """
        block, _, layer = name.rpartition(".")
        if layer not in ("gate_proj", "up_proj", "down_proj"):
            return weight
        down = self.setup.weights.quantised(f"{block}.down_proj", self.setup.device)
        if "q_invperm" not in down:
            return weight
        places = down["q_invperm"].long()
        return weight[places] if layer == "down_proj" else weight[:, places]

    def close(self) -> None:
        """See `Backend.close`."""
        if self.model is not None:
            self.model.unload()
        self.model = self.cache = None


def _tensors(module: Any) -> dict[str, Tensor]:
    """The weights that a module of ExLlamaV2 holds itself."""
    import torch

    if getattr(module, "q_tensors", None):
        return {name: tensor for name, tensor in module.q_tensors.items() if tensor.device.type == "cuda"}
    layer = getattr(module, "linear", None) or getattr(module, "embedding", None)
    parts = dict(layer.named_parameters()) if layer is not None else {"weight": getattr(module, "weight", None)}
    return {name: part.detach() for name, part in parts.items() if isinstance(part, torch.Tensor)}

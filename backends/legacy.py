"""AutoAWQ and auto-gptq, both abandoned upstream, in the environment in which they still run.

`make legacy` makes that environment: transformers 4.51, autoawq 0.2.9, auto-gptq 0.7.1. A cell's worker runs under
its interpreter, so nothing here may need more than rfloor's own modules, torch and what lies there.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from backends.quant.layouts import AwqLayout, GptqLayout, check_scales
from registry.api import (
    HEAD,
    Backend,
    BadInput,
    Requirement,
    StepBytes,
    materialize,
    nearest,
    streamed_bytes,
    unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from registry.api import Request

EMBEDDING = "model.embed_tokens.weight"
AUTO = "auto"
KERNELS = ("triton", "torch")
PACKED = ("qweight", "qzeros", "scales", "g_idx")


class AutoAwq(AwqLayout):
    """AutoAWQ's folders; the backend `autoawq` multiplies them."""

    executions = ("eager", "cuda_graph")


class AutoGptq(GptqLayout):
    """auto-gptq's folders; the backend `auto-gptq` multiplies them."""

    executions = ("eager", "cuda_graph")


@dataclass(frozen=True)
class LegacyOptions:
    """Options of both.

    Attributes:
        kernel: `auto`, which is Triton on CUDA and plain torch on the CPU, or one of them.
    """

    kernel: str = "auto"


class LegacyBackend(Backend):
    """transformers 4.51's model in float16, as these packages run it, with their own linear layers."""

    executions = ("eager", "cuda_graph")
    attentions = ("sdpa",)
    hosting = False
    environment = ".legacy"
    tags = {"upstream": "abandoned"}  # noqa: RUF012 - a class variable of the base
    Options = LegacyOptions
    triton_kernel: ClassVar[str]
    kernels: ClassVar[Mapping[str, tuple[str, ...]]]
    """Device -> what `kernel` may be there, the best first."""

    model: Any = None
    cache: Any = None

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        kernel, here = request.options.kernel, cls.kernels[request.device]
        if kernel not in (AUTO, *KERNELS):
            raise BadInput(f"backend.options.kernel={kernel}: {nearest(kernel, (AUTO, *KERNELS))}")
        if kernel not in (AUTO, *here):
            raise unsupported(
                f"{request.backend} has no {kernel} kernel on the {request.device}",
                f"Use backend.options.kernel={' or '.join(here)}",
            )
        attention = request.attention_options.kernel
        if attention != "default":
            raise unsupported(
                f"{request.backend} attends as transformers 4.51 does, and attention.options.kernel={attention} asks "
                "for another way",
                "Use attention=sdpa",
            )

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        return (cls.triton_kernel,) if cls._kernel(options, device) == "triton" else ()

    @classmethod
    def _kernel(cls, options: Any, device: str) -> str:
        """The kernel that multiplies."""
        chosen: str = options.kernel
        return cls.kernels[device][0] if chosen == AUTO else chosen

    def load(self, capacity: int) -> None:
        """See `Backend.load`."""
        import torch
        from transformers import AutoModelForCausalLM

        setup = self.setup
        self.config = setup.architecture.transformers_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                self.config, torch_dtype=torch.float16, attn_implementation="sdpa"
            )
        tied = setup.architecture.tied_embeddings
        self._layers = materialize(
            model,
            setup.weights,
            linear=_Layers(self.layer),
            device=setup.device,
            dtype=torch.float16,
            tied=(f"{HEAD}.weight",) if tied else (),
        )
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=self.config, device=setup.device)
        self.model = model.eval()
        self._capacity = capacity
        self._end = torch.zeros(1, dtype=torch.int64, device=setup.device)
        self.cache = self._new_cache()

    @abstractmethod
    def layer(self, linear: nn.Linear) -> Any:
        """The package's own layer, still empty, in the place of another."""

    def _new_cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.setup.cache == "dynamic":
            return DynamicCache()
        return StaticCache(
            self.config,
            max_batch_size=self.setup.batch_size,
            max_cache_len=self._capacity,
            device=self.setup.device,
            dtype=self.model.dtype,
        )

    def prefill(self, input_ids: Tensor) -> Tensor:
        """See `Backend.prefill`."""
        import torch

        self.cache = self.cache if self.setup.cache == "static" else self._new_cache()
        if self.setup.cache == "static":
            self.cache.reset()
        length = input_ids.shape[1]
        logits = self._forward(input_ids, torch.arange(length, device=input_ids.device))
        self._end.fill_(length)
        return logits

    def decode_step(self, token: Tensor) -> Tensor:
        """See `Backend.decode_step`."""
        logits = self._forward(token[:, None], self._end)
        self._end += 1
        return logits

    def _forward(self, input_ids: Tensor, places: Tensor) -> Tensor:
        out = self.model(
            input_ids=input_ids, past_key_values=self.cache, cache_position=places, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def seek(self, position: int) -> None:
        """See `Backend.seek`."""
        if self.setup.cache == "dynamic":
            self.cache.crop(position)
        self._end.fill_(position)

    def position(self) -> int:
        """See `Backend.position`."""
        return int(self._end)

    def bytes_per_step(self, context: float) -> StepBytes:
        """See `Backend.bytes_per_step`."""
        a, held = self.setup.architecture, self.weights()
        looked_up = None if a.tied_embeddings else held[EMBEDDING]
        weights = streamed_bytes(held.values(), looked_up, self.setup.batch_size)
        return StepBytes(weights, a.kv_bytes_per_token(2) * context * self.setup.batch_size)

    def weights(self) -> Mapping[str, Tensor]:
        """See `Backend.weights`."""
        held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: tensor for name, tensor in held.items() if "rotary" not in name}

    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        """See `Backend.dequantized`: out of the folder, by our own decoder."""
        for name, tensor in self.model.named_parameters():
            yield name, tensor.detach().to(self.setup.dtype)
        for name, layer in self._layers.items():
            packed = self.setup.weights.quantised(name, self.setup.device)
            yield f"{name}.weight", self.setup.linear.decode(packed).to(self.setup.dtype)
            bias: Any = layer.bias
            if bias is not None:
                yield f"{name}.bias", bias.to(self.setup.dtype)

    def close(self) -> None:
        """See `Backend.close`."""
        self.model = self.cache = None
        self._layers = {}


class AutoAwqBackend(LegacyBackend):
    """autoawq 0.2.9's `WQLinear_GEMM`: its Triton kernel on CUDA, its plain torch fallback on the CPU."""

    formats = ("autoawq",)
    triton_kernel = "awq_(gemm|dequantize)_kernel"
    kernels = {"cuda": ("triton",), "cpu": ("torch",)}  # noqa: RUF012 - a class variable of the base
    requires = (Requirement("autoawq==0.2.9", "make legacy"),)

    def layer(self, linear: nn.Linear) -> Any:
        """See `LegacyBackend.layer`."""
        from awq.modules.linear import gemm

        if self._kernel(self.setup.options, self.setup.device) == "torch":
            gemm.awq_ext, gemm.TRITON_AVAILABLE = None, False  # or it takes Triton's on the CPU, too
        device = self.setup.device
        size = self.setup.linear.group_size
        return gemm.WQLinear_GEMM(4, size, linear.in_features, linear.out_features, linear.bias is not None, device)


class AutoGptqBackend(LegacyBackend):
    """auto-gptq 0.7.1's layers: `qlinear_triton` on CUDA, or `qlinear_cuda` without its extension, in plain torch."""

    formats = ("auto-gptq",)
    triton_kernel = "quant_matmul"
    kernels = {"cuda": ("triton", "torch"), "cpu": ("torch",)}  # noqa: RUF012 - a class variable of the base
    requires = (Requirement("auto-gptq==0.7.1", "make legacy"),)

    def layer(self, linear: nn.Linear) -> Any:
        """See `LegacyBackend.layer`."""
        import importlib

        module = {"triton": "qlinear_triton", "torch": "qlinear_cuda"}[
            self._kernel(self.setup.options, self.setup.device)
        ]
        layer_class = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{module}").QuantLinear
        size = self.setup.linear.group_size
        layer = layer_class(4, size, linear.in_features, linear.out_features, linear.bias is not None)
        return layer.to(self.setup.device)


class _Layers:
    """What `materialize` asks of a format, answered by a package's layers."""

    keeps = (HEAD,)

    def __init__(self, make: Any) -> None:
        self._make = make

    def convert(self, linear: nn.Linear) -> nn.Module:
        raise unsupported(
            "this runtime reads quantised folders",
            "rfloor synthesize model=... model.weights=DIR quant=... out=DIR2 makes one",
        )

    def from_tensors(self, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> nn.Module:
        import torch

        check_scales(tensors["scales"])
        layer = self._make(linear)
        for name in PACKED:
            if name in tensors and name in layer._buffers:
                layer._buffers[name] = tensors[name]
        layer._buffers["scales"] = tensors["scales"].half()
        if linear.bias is not None:
            layer._buffers["bias"] = linear.bias.data.to(torch.float16)
        made: nn.Module = layer.eval()
        return made

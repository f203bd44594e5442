"""int4 layers of gptqmodel, one of its kernels chosen by name and never another in its place."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from backends.quant.layouts import ROWS, GroupwiseLayout, GroupwiseOptions, check_scales
from registry.api import BadInput, LinearFormat, Requirement, nearest, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from registry.api import Architecture, Request

AUTO = "auto"
BEST = {"cpu": "torch", "cuda": "marlin"}
"""What `auto` is on each device."""
DERIVED = ("_g_idx_long_cache", "_zeros_cache")
"""Attributes in which gptqmodel's torch layers keep what they compute at their first product."""


@dataclass(frozen=True)
class Kernel:
    """One of gptqmodel's kernels.

    Attributes:
        module: Where its layer is.
        layer: The layer's class.
        devices: Where it runs.
        extension: gptqmodel's name of what is compiled at its first use; empty where nothing is.
        name: What its CUDA kernels are called, as a regular expression.
        casts: Whether it multiplies in float16 whatever the model's dtype, casting before and after.
        rows: Output features come in multiples of this: whole words, and the kernel's tiles.
        whole_groups: Whether they come in multiples of the group size, too.
        executions: How a step with it can be launched.
    """

    module: str
    layer: str
    devices: tuple[str, ...] = ("cuda",)
    extension: str = ""
    name: str = ""
    casts: bool = False
    rows: int = ROWS
    whole_groups: bool = False
    executions: tuple[str, ...] = ("eager", "cuda_graph", "compile")

    def multiple(self, group_size: int) -> int:
        """What output features have to be a multiple of."""
        return max(self.rows, group_size) if self.whole_groups else self.rows


@dataclass(frozen=True)
class KernelOptions(GroupwiseOptions):
    """Options of a group-wise int4 format with kernels to choose from.

    Attributes:
        kernel: Which of the runtime's kernels multiplies; `auto` is torch on the CPU and Marlin on CUDA.
    """

    kernel: str = AUTO


@dataclass(frozen=True)
class _Told:
    """What a layer was made of: kernels repack weights and biases, some of them in place.

    Attributes:
        dtype: The model's.
        tensors: As a checkpoint holds them, read anew or on the host.
        bias: On the host.
    """

    dtype: Any
    tensors: Mapping[str, Tensor]
    bias: Tensor | None


class GroupwiseLinear(GroupwiseLayout, LinearFormat):
    """What GPTQ and AWQ through gptqmodel share.

    Class variables:
        kernels: By the name that `quant.options.kernel` gives.
    """

    requires = (Requirement("gptqmodel>=7.6,<7.7", "pip install -e '.[gptq]'"),)
    executions = ("eager", "cuda_graph", "compile")
    Options = KernelOptions
    kernels: ClassVar[dict[str, Kernel]]

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        super().check(request)
        o = request.options
        kernel = cls.kernel(o, request.device)
        if request.device not in kernel.devices:
            here = [name for name, other in cls.kernels.items() if request.device in other.devices]
            raise unsupported(
                f"gptqmodel's {o.kernel} kernel runs on {' and '.join(kernel.devices)}, this device is the "
                f"{request.device}",
                f"Use quant.options.kernel={' or '.join(here)}",
            )
        if request.execution not in kernel.executions:
            raise unsupported(
                f"gptqmodel launches its {o.kernel} kernel on CUDA's default stream, which no graph captures"
                if request.execution == "cuda_graph"
                else f"gptqmodel's {o.kernel} kernel hangs on a handle that torch.compile cannot follow",
                f"Use execution={' or '.join(kernel.executions)}, or another quant.options.kernel",
            )
        for name, (_, tall) in request.architecture.linear_shapes.items():
            if tall % kernel.multiple(o.group_size):
                raise unsupported(
                    f"gptqmodel's {kernel.layer} takes output features in multiples of "
                    f"{kernel.multiple(o.group_size)}; {name} of {request.architecture.name} has {tall}",
                    "Use another quant.options.kernel",
                )

    def fits(self, architecture: Architecture) -> None:
        """See `CheckpointFormat.fits`."""
        kernel = self.options.kernel
        if kernel not in (AUTO, *self.kernels):
            raise BadInput(f"quant.options.kernel={kernel}: {nearest(kernel, (AUTO, *self.kernels))}")
        super().fits(architecture)

    @classmethod
    def kernel(cls, options: Any, device: str) -> Kernel:
        """The kernel that multiplies on a device."""
        return cls.kernels[BEST[device] if options.kernel == AUTO else options.kernel]

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        name = cls.kernel(options, device).name
        return (name,) if name and device == "cuda" else ()

    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        """See `Plugin.builds`."""
        name = cls.kernel(options, device).extension
        return f"gptqmodel's {name} kernels" if name else ""

    @classmethod
    def build(cls, options: Any, device: str) -> None:
        """See `Plugin.build`."""
        importlib.import_module("gptqmodel.extension").load(name=cls.kernel(options, device).extension)

    def convert(self, linear: nn.Linear) -> nn.Module:
        """See `LinearFormat.convert`."""
        rows = self.kernel(self.options, linear.weight.device.type).multiple(self.group_size)
        if linear.in_features % self.group_size or linear.out_features % rows:
            raise unsupported(
                f"{self.method} needs input features in multiples of {self.group_size} and output features in "
                f"multiples of {rows}; this model has a layer of {linear.in_features} x {linear.out_features}",
                "Use quant=none, or another quant.options.group_size",
            )
        encoded = self.encode(linear.weight.data, "")
        return self._made(linear, encoded, {name: tensor.cpu() for name, tensor in encoded.items()})

    def from_tensors(self, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See `LinearFormat.from_tensors`."""
        return self._made(linear, tensors, tensors)

    def _made(self, linear: nn.Linear, tensors: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> nn.Module:
        """The kernel's layer for `tensors`, which it may change; `original` stays as it is."""
        import torch

        scales = tensors["scales"]
        check_scales(scales)
        kernel = self.kernel(self.options, scales.device.type)
        layer_class: Any = getattr(importlib.import_module(kernel.module), kernel.layer)
        dtype = linear.weight.dtype
        product = torch.float16 if kernel.casts else dtype
        described = self.described() | {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "pack_dtype": torch.int32,
        }
        taken, why = layer_class.validate(**described, dtype=product)
        if not taken:
            raise unsupported(f"gptqmodel's {kernel.layer} does not take this layer: {why}")
        layer = layer_class(**described, bias=False, register_buffers=True, dtype=product)
        told = _Told(dtype, original, None if linear.bias is None else linear.bias.detach().cpu())
        for name, tensor in self.prepared(tensors, kernel.layer, dtype).items():
            _replace(layer, name, tensor)
        if linear.bias is not None:
            _replace(layer, "bias", linear.bias.data)
        self.finish(layer)
        layer.told = told
        made: nn.Module = layer.eval()
        return made

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The layer's quantisation, as gptqmodel's constructors take it."""

    @abstractmethod
    def prepared(self, tensors: Mapping[str, Tensor], layer: str, dtype: Any) -> dict[str, Tensor]:
        """The checkpoint's tensors as the kernel's layer wants them."""

    def finish(self, layer: Any) -> None:
        """Let the layer repack itself."""
        layer.post_init()

    def dequantize(self, module: nn.Module) -> Tensor:
        """See `LinearFormat.dequantize`: out of the checkpoint's own tensors, by code that no kernel shares."""
        layer: Any = module
        told: _Told = layer.told
        device = layer.qweight.device
        weight = self.decode({name: tensor.to(device) for name, tensor in told.tensors.items()})
        return weight.to(told.dtype)

    def bias(self, module: nn.Module) -> Tensor | None:
        """See `LinearFormat.bias`: as it was given, since Marlin permutes its own."""
        layer: Any = module
        told: _Told = layer.told
        return None if told.bias is None else told.bias.to(layer.qweight.device)

    def stored(self, module: nn.Module) -> list[Tensor]:
        """See `LinearFormat.stored`: the layer's tensors and what it derives from them once, views left out."""
        derived = (getattr(module, name, None) for name in DERIVED)
        held = [*module.parameters(), *module.buffers(), *(tensor for tensor in derived if tensor is not None)]
        return [*{tensor.untyped_storage().data_ptr(): tensor for tensor in held if tensor.numel()}.values()]


def _replace(layer: Any, name: str, tensor: Tensor) -> None:
    """Put a tensor where the layer has a parameter, a buffer or nothing yet."""
    import torch

    layer.__dict__.pop(name, None)  # some layers say None for a bias that is not there
    if name in layer._parameters:
        layer._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        layer._buffers[name] = tensor

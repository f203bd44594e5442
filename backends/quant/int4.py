"""rfloor's own int4: a tensor core product that reads a weight as it lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.int4.kernel.files import FILES
from backends.int4.layout import GROUP, MOST_ROWS, ROWS
from backends.quant import groupwise
from backends.quant.layouts import GptqLayout, GroupwiseOptions, check_scales, in_order
from registry.api import BadInput, LinearFormat, Outcome, Refused, Request, nearest, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

HEADS = (4, 16)
ZERO = groupwise.MIDDLE - 1
"""What GPTQ's checkpoints store for the symmetric zero."""
OTHERWISE = "Use quant=gptq, which multiplies any of GPTQ's folders"


@dataclass(frozen=True)
class Int4Options(GroupwiseOptions):
    """Options of `Int4`.

    Attributes:
        head_bits: Of the LM head: 16 leaves it as it is, 4 rounds it as the other layers.
    """

    head_bits: int = 16


class Int4(GptqLayout, LinearFormat):
    """Symmetric int4 with a float16 scale for 128 input features, out of GPTQ's checkpoints or rounded here.

    On CUDA up to `MOST_ROWS` rows go through the kernel, four at a time, so that five streams read a weight twice;
    more go through a dequantised weight, and on the CPU all do. The kernel takes activations as whole numbers, 16
    bits for the largest of each group of them.
    """

    executions = ("eager", "cuda_graph")
    min_capability = (9, 0)  # programmatic dependent launch
    data = tuple(f"../int4/kernel/{name}" for name in FILES)
    Options = Int4Options

    @property
    def keeps(self) -> tuple[str, ...]:
        """See `LinearFormat.keeps`."""
        return () if self.options.head_bits == groupwise.BITS else super().keeps

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        super().check(request)
        if request.device == "cuda" and request.batch_size > MOST_ROWS:
            raise unsupported(
                f"int4 takes up to {MOST_ROWS} streams, not {request.batch_size}",
                f"Use protocol.batch_size={MOST_ROWS} or less, or quant=gptq-marlin",
            )

    def fits(self, architecture: Any) -> None:
        """See `CheckpointFormat.fits`."""
        if self.group_size != GROUP:
            raise BadInput(f"quant.options.group_size={self.group_size}: int4's kernel has groups of {GROUP}")
        if self.options.head_bits not in HEADS:
            bits = self.options.head_bits
            raise BadInput(f"quant.options.head_bits={bits}: {nearest(str(bits), map(str, HEADS))}")
        if self.options.head_bits == groupwise.BITS and architecture.vocab % ROWS:
            raise BadInput(
                f"int4's kernel takes output features in multiples of {ROWS}; the LM head of {architecture.name} has "
                f"{architecture.vocab}: use quant.options.head_bits=16"
            )
        super().fits(architecture)

    def adopt(self, config: Mapping[str, Any]) -> None:
        """See `CheckpointFormat.adopt`."""
        super().adopt(config)
        if not self.symmetric or self.desc_act or self.group_size != GROUP:
            raise BadInput(
                f"int4 reads symmetric GPTQ folders in groups of {GROUP} without an activation order; this one has "
                f"sym={self.symmetric}, desc_act={self.desc_act}, group_size={self.group_size}: use quant=gptq"
            )

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        return ("int4_product",) if device == "cuda" else ()

    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        """See `Plugin.builds`."""
        return "rfloor's int4 kernel" if device == "cuda" else ""

    @classmethod
    def build(cls, options: Any, device: str) -> None:
        """See `Plugin.build`."""
        from torch.utils.cpp_extension import CUDA_HOME

        from backends.int4.kernel.loader import extension

        if CUDA_HOME is None:
            raise Refused(
                Outcome.MISSING_DEPENDENCY,
                "nvcc, which compiles rfloor's int4 kernel, is not found",
                "Install the CUDA toolkit of the version that torch is built for, or say where it is by CUDA_HOME; "
                "quant=gptq-marlin needs none",
            )
        extension()

    def convert(self, linear: nn.Linear) -> nn.Module:
        """See `LinearFormat.convert`."""
        if linear.in_features % GROUP or linear.out_features % ROWS:
            raise unsupported(
                f"int4 needs input features in multiples of {GROUP} and output features in multiples of {ROWS}; this "
                f"model has a layer of {linear.in_features} x {linear.out_features}",
                "Use quant=none",
            )
        codes, scales, _ = groupwise.symmetric(linear.weight.data, GROUP)
        return _made(linear, codes, scales)

    def from_tensors(self, linear: nn.Linear, tensors: Mapping[str, Tensor]) -> nn.Module:
        """See `LinearFormat.from_tensors`."""
        given = tensors["scales"]
        check_scales(given)
        scales = given.half()
        if bool((scales.isinf() | (scales == 0) & (given != 0)).any()):
            raise unsupported("the checkpoint has scales outside float16, in which int4 keeps them", OTHERWISE)
        if not in_order(tensors["g_idx"], GROUP):
            raise unsupported(
                f"the checkpoint's groups are not {GROUP} input features each in their order, as int4 reads them",
                OTHERWISE,
            )
        if bool((groupwise.unpack_columns(tensors["qzeros"]) != ZERO).any()):
            raise unsupported("the checkpoint has zeros of its own, and int4 multiplies symmetric weights", OTHERWISE)
        return _made(linear, groupwise.unpack_rows(tensors["qweight"]).T, scales.T)

    def dequantize(self, module: nn.Module) -> Tensor:
        """See `LinearFormat.dequantize`."""
        layer: Any = module
        weight: Tensor = layer.weight()
        return weight


def _made(linear: nn.Linear, codes: Tensor, scales: Tensor) -> nn.Module:
    from backends.int4.layout import pack, pack_scales
    from backends.int4.product import Int4Linear

    bias = None if linear.bias is None else linear.bias.data
    return Int4Linear(pack(codes), pack_scales(scales), bias, linear.weight.dtype)

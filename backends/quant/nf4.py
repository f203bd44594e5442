"""NF4 and FP4 through bitsandbytes: 16 levels, one absmax a block of weights.

The study says that bitsandbytes dequantises and then multiplies; for one token current versions
multiply out of the packed weights (`gemm_4bit`, and on AVX512-BF16 CPUs a repacked kernel).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.api import BadInput, LinearFormat, Requirement, nearest, unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from registry.api import Request

LEVELS = ("nf4", "fp4")
ROWS = 32  # the CPU kernel's tile of output rows
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights an absmax that bitsandbytes 0.50 knows."""


@dataclass(frozen=True)
class Nf4Options:
    """Options of `Nf4`.

    Attributes:
        block_size: Weights that share one absmax.
        levels: `nf4`, sixteen quantiles of a normal distribution, or `fp4`, a sign and three bits of a float.
        double_quant: Whether the absmax are quantised too, to 8 bits with a scale for 256 of them.
    """

    block_size: int = 64
    levels: str = "nf4"
    double_quant: bool = False


class Nf4(LinearFormat):
    """bitsandbytes' `Linear4bit`."""

    requires = (Requirement("bitsandbytes>=0.50", "pip install -e '.[nf4]'"),)
    executions = ("eager", "cuda_graph", "compile")
    Options = Nf4Options

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        if request.options.block_size not in BLOCKS:
            raise BadInput(f"quant.options.block_size={request.options.block_size}: {nearest('', map(str, BLOCKS))}")
        if request.options.levels not in LEVELS:
            raise BadInput(
                f"quant.options.levels={request.options.levels}: {nearest(request.options.levels, LEVELS)}"
            )

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`: the product's, or for many streams the dequantisation's."""
        return ("4bit|[dD]equantize",)

    def convert(self, linear: nn.Linear) -> nn.Module:
        """See `LinearFormat.convert`."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Linear4bit, Params4bit

        block, double = self.options.block_size, self.options.double_quant
        rows = ROWS if linear.weight.device.type == "cpu" else 1
        if linear.out_features % rows or linear.in_features % block:
            raise unsupported(
                f"{self.options.levels} needs input features in multiples of {block} and, here, output features in "
                f"multiples of {rows}; this model has a layer of {linear.in_features} x {linear.out_features}",
                "Use quant=none, or another quant.options.block_size",
            )
        packed, state = quantize_4bit(
            linear.weight.data, blocksize=block, compress_statistics=double, quant_type=self.options.levels
        )
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=double,
            quant_type=self.options.levels,
            device="meta",
        )
        layer.weight = Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=block,
            compress_statistics=double,
            quant_type=self.options.levels,
            bnb_quantized=True,
            module=layer,
        )
        layer.quant_state = state
        layer.bias = linear.bias
        converted: nn.Module = layer.eval()  # on the CPU the fused kernel is chosen in eval mode only
        return converted

    def dequantize(self, module: nn.Module) -> Tensor:
        """See `LinearFormat.dequantize`."""
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

        packed, state = _packed(module)
        if getattr(state, "packing_format_for_cpu", False):
            # The first product on an AVX512-BF16 CPU repacked the weight. The inverse changes the state that
            # it is given and leaves absmax transposed in bf16, so it gets a copy and is helped along.
            state = copy.copy(state)
            state.original_nested = False  # the absmax were dequantised for good when they were repacked
            packed, state = _convert_weight_packed_for_cpu_inverse(packed, state)
            state.absmax = state.absmax.T.reshape(-1).float()
        weight: Tensor = dequantize_4bit(packed.view(-1, 1), state)
        return weight

    def stored(self, module: nn.Module) -> list[Tensor]:
        """See `LinearFormat.stored`: packed weights, absmax and what they are quantised by, the 16 levels, bias."""
        packed, state = _packed(module)
        tensors = [packed, state.absmax, state.code]
        if state.offset is not None:
            tensors.append(state.offset)
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code]
        bias: Any = module.bias
        return tensors if bias is None else [*tensors, bias]


def _packed(module: nn.Module) -> tuple[Tensor, Any]:
    weight: Any = module.weight
    return weight.data, weight.quant_state

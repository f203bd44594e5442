"""Linear layers as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.api import LinearFormat

if TYPE_CHECKING:
    from torch import Tensor, nn


class NoQuant(LinearFormat):
    """The model's own dtype, torch's own product."""

    executions = ("eager", "cuda_graph", "compile")

    def convert(self, linear: nn.Linear) -> nn.Module:
        """See `LinearFormat.convert`: the layer itself."""
        return linear

    def dequantize(self, module: nn.Module) -> Tensor:
        """See `LinearFormat.dequantize`."""
        weight: Tensor = module.get_parameter("weight")
        return weight.detach()

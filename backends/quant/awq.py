"""AWQ's int4 through gptqmodel, on the kernel that the options name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.quant import groupwise
from backends.quant.gptqmodel_linear import GroupwiseLinear, Kernel, KernelOptions
from backends.quant.layouts import AwqLayout
from registry.api import unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from registry.api import Request

LAYERS = "gptqmodel.nn_modules.qlinear"


@dataclass(frozen=True)
class AwqOptions(KernelOptions):
    """Options of `Awq`."""


class Awq(GroupwiseLinear, AwqLayout):
    """Int4 with a scale and a zero a group, in the GEMM layout of AutoAWQ's checkpoints."""

    Options = AwqOptions
    kernels = {  # noqa: RUF012 - a class variable of the base
        "gemm": Kernel(
            f"{LAYERS}.gemm_awq",
            "AwqGEMMLinear",
            extension="awq",
            name="gemm_forward_4bit_cuda",
            rows=64,
            whole_groups=True,
        ),
        "marlin": Kernel(f"{LAYERS}.marlin_awq", "AwqMarlinLinear", extension="marlin_bf16", name="marlin::Marlin"),
        "torch": Kernel(f"{LAYERS}.torch_awq", "AwqTorchLinear", devices=("cpu", "cuda")),
    }

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`.

        `gemv` is known and refused. On one H200 (2026-11-22) its products with 10, 33 or 200 rows held NaNs in 20 of
        132 cases, small layers and larger ones, not the same ones twice; with 1 or 5 rows all of 88 were right.
        """
        if request.options.kernel == "gemv":
            raise unsupported(
                "gptqmodel 7.6.0's GEMV layer gives NaNs for more than 8 rows, so for a prefill",
                "Use quant.options.kernel=marlin or gemm",
            )
        super().check(request)

    def described(self) -> dict[str, Any]:
        """See `GroupwiseLinear.described`."""
        return {"bits": groupwise.BITS, "group_size": self.group_size, "desc_act": False, "sym": False}

    def prepared(self, tensors: Mapping[str, Tensor], layer: str, dtype: Any) -> dict[str, Tensor]:
        """See `GroupwiseLinear.prepared`."""
        return dict(tensors) | {"scales": tensors["scales"].to(dtype)}

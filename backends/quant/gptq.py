"""GPTQ's int4 through gptqmodel, on the kernel that the options name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.quant import groupwise
from backends.quant.gptqmodel_linear import GroupwiseLinear, Kernel, KernelOptions
from backends.quant.layouts import GptqLayout, in_order
from registry.api import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

LAYERS = "gptqmodel.nn_modules.qlinear"
ONE_EACH = 0x11111111
"""One in each nibble: checkpoints store a zero less one, most kernels want the zero."""


@dataclass(frozen=True)
class GptqOptions(KernelOptions):
    """Options of `Gptq`."""


class Gptq(GroupwiseLinear, GptqLayout):
    """Symmetric int4 with a scale a group, in the layout of AutoGPTQ's checkpoints.

    The torch kernel is gptqmodel's without its torch.compile, which compiles a function of every layer and gives up
    after Dynamo's eighth; on CUDA it dequantises by gptqmodel's Triton kernel.
    """

    Options = GptqOptions
    kernels = {  # noqa: RUF012 - a class variable of the base
        "marlin": Kernel(f"{LAYERS}.marlin", "MarlinLinear", extension="marlin_bf16", name="marlin::Marlin"),
        "exllamav2": Kernel(
            f"{LAYERS}.exllamav2",
            "ExllamaV2Linear",
            extension="exllamav2",
            name="gemm_half_q_half",
            casts=True,
            executions=("eager",),
        ),
        "triton": Kernel(f"{LAYERS}.tritonv2", "TritonV2Linear", name="dequant_kernel"),
        "torch": Kernel(f"{LAYERS}.torch", "TorchLinear", devices=("cpu", "cuda")),
    }

    def adopt(self, config: Mapping[str, Any]) -> None:
        """See `CheckpointFormat.adopt`."""
        super().adopt(config)
        if not self.symmetric and self.options.kernel == "marlin":
            raise BadInput(
                "the folder's weights are asymmetric, and gptqmodel's Marlin multiplies symmetric GPTQ; "
                "use quant.options.kernel=triton or exllamav2"
            )

    def described(self) -> dict[str, Any]:
        """See `GroupwiseLinear.described`."""
        return {
            "bits": groupwise.BITS,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
        }

    def prepared(self, tensors: Mapping[str, Tensor], layer: str, dtype: Any) -> dict[str, Tensor]:
        """See `GroupwiseLinear.prepared`.

        ExLlamaV2's kernel takes every `g_idx` that is not all zeros for an activation order and gathers its input by
        it. Groups that follow each other need no index.
        """
        import torch

        found = dict(tensors)
        if layer == self.kernels["marlin"].layer:
            found["scales"] = found["scales"].to(dtype)
            return found
        found["qzeros"] = found["qzeros"] + ONE_EACH
        if layer == self.kernels["exllamav2"].layer and in_order(found["g_idx"], self.group_size):
            found["g_idx"] = torch.zeros_like(found["g_idx"])
        return found

    def finish(self, layer: Any) -> None:
        """See `GroupwiseLinear.finish`."""
        layer.optimized = True  # keeps post_init from torch.compile
        if self.options.kernel == "exllamav2":
            layer.post_init(self._scratch(layer))
        else:
            layer.post_init()

    def _scratch(self, layer: Any) -> Any:
        """Where the ExLlamaV2 kernel dequantises for long inputs: one for all, made anew for a larger layer."""
        from gptqmodel.utils.exllamav2 import ScratchSpace

        held = getattr(self, "_space", None)
        if held is None or held.scratch_bytes < layer.temp_dq_size():
            self._space = ScratchSpace(layer.temp_dq_size(), layer.qweight.device)
        return self._space

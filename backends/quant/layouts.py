"""The checkpoint layouts of GPTQ and AWQ, whoever multiplies them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from backends.quant import groupwise
from registry.api import BadInput, CheckpointFormat, Quant, Stored, nearest, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from registry.api import Architecture, Request

GROUP_SIZES = (32, 64, 128)
ROWS = 32
"""Output features come in multiples of this: whole words, and the tiles of every kernel."""


@dataclass(frozen=True)
class GroupwiseOptions:
    """Options of a group-wise int4 format.

    Attributes:
        group_size: Input features that share a scale, where weights are quantised here; a folder has its own.
    """

    group_size: int = 128


class GroupwiseLayout(Quant, CheckpointFormat):
    """What the layouts share."""

    Options: ClassVar[type] = GroupwiseOptions

    @property
    def group_size(self) -> int:
        """Input features that share a scale."""
        size: int = self.options.group_size
        return size

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        cls(request.options).fits(request.architecture)

    def fits(self, architecture: Architecture) -> None:
        """See `CheckpointFormat.fits`."""
        size = self.options.group_size
        if size not in GROUP_SIZES:
            raise BadInput(f"quant.options.group_size={size}: {nearest('', map(str, GROUP_SIZES))}")
        for name, (wide, tall) in architecture.linear_shapes.items():
            if wide % size:
                fitting = [str(other) for other in GROUP_SIZES if wide % other == 0]
                raise BadInput(
                    f"quant.options.group_size={size} does not divide the {wide} input features of {name} in "
                    f"{architecture.name}; fitting: {', '.join(fitting) or 'none'}"
                )
            if tall % ROWS:
                raise BadInput(
                    f"{self.method} takes output features in multiples of {ROWS}; {name} of {architecture.name} has "
                    f"{tall}"
                )

    def adopt(self, config: Mapping[str, Any]) -> None:
        """See `CheckpointFormat.adopt`."""
        bits, group_size = config.get("bits"), config.get("group_size")
        if bits != groupwise.BITS:
            raise BadInput(f"the folder's weights have {bits} bits, rfloor's {self.method} kernels multiply 4")
        if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
            raise BadInput(f"the folder's group size is {group_size}; {nearest('', map(str, GROUP_SIZES))}")
        self.options = replace(self.options, group_size=group_size)


class GptqLayout(GroupwiseLayout):
    """AutoGPTQ's: eight input features to a word, and the index of each one's group."""

    method = "gptq"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.desc_act = False
        self.symmetric = True

    def quantization_config(self) -> dict[str, Any]:
        """See `CheckpointFormat.quantization_config`."""
        return {
            "quant_method": self.method,
            "checkpoint_format": "gptq",
            "bits": groupwise.BITS,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
            "lm_head": False,
            "pack_dtype": "int32",
        }

    def adopt(self, config: Mapping[str, Any]) -> None:
        """See `CheckpointFormat.adopt`."""
        super().adopt(config)
        if config.get("checkpoint_format", "gptq") != "gptq":
            raise BadInput(f"the folder's checkpoint_format is {config['checkpoint_format']}; Known: gptq")
        self.desc_act = bool(config.get("desc_act", False))
        self.symmetric = bool(config.get("sym", True))

    def layout(self, in_features: int, out_features: int) -> dict[str, Stored]:
        """See `CheckpointFormat.layout`."""
        groups = in_features // self.group_size
        return {
            "qweight": Stored((in_features // groupwise.WORD, out_features), ("I32",)),
            "qzeros": Stored((groups, out_features // groupwise.WORD), ("I32",)),
            "scales": Stored((groups, out_features), ("F16", "BF16")),
            "g_idx": Stored((in_features,), ("I32",)),
        }

    def encode(self, weight: Tensor, layer: str) -> dict[str, Tensor]:
        """See `CheckpointFormat.encode`: rounded to nearest, not by GPTQ's own order, which needs activations."""
        import torch

        codes, scales, zeros = groupwise.symmetric(weight, self.group_size)
        return {
            "qweight": groupwise.pack_rows(codes.T),
            "qzeros": groupwise.pack_columns(zeros.T - 1),
            "scales": scales.T.contiguous(),
            "g_idx": (torch.arange(weight.shape[1], device=weight.device) // self.group_size).int(),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `CheckpointFormat.decode`."""
        group = tensors["g_idx"].long()
        zeros = groupwise.unpack_columns(tensors["qzeros"]).float() + 1
        codes = groupwise.unpack_rows(tensors["qweight"]).float()
        return ((codes - zeros[group]) * tensors["scales"].float()[group]).T.contiguous()


def check_scales(scales: Tensor) -> None:
    """Refuse what headers do not tell: a damaged folder's scales.

    Raises:
        Refused: One is infinite or no number.
    """
    if not bool(scales.isfinite().all()):
        raise unsupported("the checkpoint is damaged: a scale is infinite or no number")


def in_order(g_idx: Tensor, size: int) -> bool:
    """Whether GPTQ's groups, of `size` input features, follow each other as these do, as without activation order."""
    import torch

    order = torch.arange(len(g_idx), device=g_idx.device) // size
    return torch.equal(g_idx.long(), order)


class AwqLayout(GroupwiseLayout):
    """AutoAWQ's for its GEMM kernels: eight output features to a word, in an order of their own."""

    method = "awq"

    def quantization_config(self) -> dict[str, Any]:
        """See `CheckpointFormat.quantization_config`."""
        return {
            "quant_method": self.method,
            "bits": groupwise.BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def adopt(self, config: Mapping[str, Any]) -> None:
        """See `CheckpointFormat.adopt`."""
        super().adopt(config)
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise BadInput(f"the folder is laid out for AWQ's version {version}; Known: gemm")

    def layout(self, in_features: int, out_features: int) -> dict[str, Stored]:
        """See `CheckpointFormat.layout`."""
        words, groups = out_features // groupwise.WORD, in_features // self.group_size
        return {
            "qweight": Stored((in_features, words), ("I32",)),
            "qzeros": Stored((groups, words), ("I32",)),
            "scales": Stored((groups, out_features), ("F16", "BF16")),
        }

    def encode(self, weight: Tensor, layer: str) -> dict[str, Tensor]:
        """See `CheckpointFormat.encode`: rounded to nearest, without AWQ's own scaling, which needs activations."""
        codes, scales, zeros = groupwise.asymmetric(weight, self.group_size)
        return {
            "qweight": groupwise.pack_columns(codes.T, groupwise.AWQ_ORDER),
            "qzeros": groupwise.pack_columns(zeros.T, groupwise.AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `CheckpointFormat.decode`."""
        return groupwise.dequantize(
            groupwise.Codes(
                groupwise.unpack_columns(tensors["qweight"], groupwise.AWQ_ORDER).T,
                tensors["scales"].T,
                groupwise.unpack_columns(tensors["qzeros"], groupwise.AWQ_ORDER).T,
            )
        )

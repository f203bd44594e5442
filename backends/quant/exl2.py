"""EXL2, ExLlamaV2's own storage: a mixture of bit widths along the input features of each layer.

The layout, as ExLlamaV2 0.3.2 reads it. Input features are sorted, the ones that matter most first, and cut into
groups; each group has a width of its own (8, 6, 5, 4, 3 or 2 bits, in this order). For a group's rows and each
output column

    w = (q - 2 ** (bits - 1)) * (s + 1) ** 2 * m / 256

with q the code, s a 4-bit scale of group and column, m a float16 of the group. 32 rows of b bits stand in b words of
32 bits a column, the first row in the lowest bits. Encoder and decoder here are our own, in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.quant import groupwise
from registry.api import BadInput, CheckpointFormat, Quant, Requirement, Stored, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from registry.api import Architecture, Request

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)
ROWS = 32
"""Rows that are packed together."""
SCALES = 16
"""Values of the 4-bit scale, 1 to 16 once the one is added that is not stored."""
WORD_BITS = 32


@dataclass(frozen=True)
class Exl2Options:
    """Options of `Exl2`.

    Attributes:
        bpw: Bits a weight of a block's layers, scales, groups and permutation included; a folder has its own.
        head_bits: The same of the LM head.
    """

    bpw: float = 4.25
    head_bits: float = 6.0


class Exl2(Quant, CheckpointFormat):
    """The storage of ExLlamaV2's models; the backend `exllamav2` multiplies it."""

    requires = (Requirement("exllamav2>=0.3.2,<0.4", "pip install -e '.[exl2]'"),)
    devices = ("cuda",)
    executions = ("eager", "cuda_graph")
    Options = Exl2Options
    method = "exl2"

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        cls(request.options).fits(request.architecture)

    def fits(self, architecture: Architecture) -> None:
        """See `CheckpointFormat.fits`."""
        for name in ("bpw", "head_bits"):
            value = getattr(self.options, name)
            if not WIDTHS[0] < value <= WIDTHS[-1]:
                raise BadInput(f"quant.options.{name}={value}: more than {WIDTHS[0]} and at most {WIDTHS[-1]}")
        shapes = architecture.linear_shapes | {"lm_head": (architecture.hidden, architecture.vocab)}
        for name, (wide, tall) in shapes.items():
            if wide % ROWS or tall % ROWS:
                raise BadInput(
                    f"EXL2 packs {ROWS} features together, and {name} of {architecture.name} has {wide} x {tall}"
                )

    def quantization_config(self) -> dict[str, Any]:
        """See `CheckpointFormat.quantization_config`."""
        return {
            "quant_method": self.method,
            "version": "0.3.2",
            "bits": self.options.bpw,
            "head_bits": self.options.head_bits,
        }

    def adopt(self, config: Mapping[str, Any]) -> None:
        """See `CheckpointFormat.adopt`: the widths stand beside the codes."""
        if not isinstance(config.get("bits"), int | float):
            raise BadInput(f"an EXL2 folder tells its bits; {nearest('bits', config)}")

    def covers(self, layer: str) -> bool:
        """See `CheckpointFormat.covers`: the LM head too."""
        return True

    def layout(self, in_features: int, out_features: int) -> dict[str, Stored]:
        """See `CheckpointFormat.layout`."""
        return {
            "q_weight": Stored((None, out_features), ("I32",)),
            "q_scale": Stored((None, out_features // groupwise.WORD), ("I32",)),
            "q_scale_max": Stored((None,), ("F16",)),
            "q_groups": Stored((None,), ("I16",)),
            "q_invperm": Stored((in_features,), ("I32", "I16")),
        }

    def encode(self, weight: Tensor, layer: str) -> dict[str, Tensor]:
        """See `CheckpointFormat.encode`: rounded to nearest; the rows of the largest norm come first."""
        import torch

        rows = weight.T.float()
        order = rows.norm(dim=1).argsort(descending=True, stable=True)
        rows = rows[order]
        target = self.options.head_bits if layer == "lm_head" else self.options.bpw
        group_size = next(size for size in GROUP_SIZES if rows.shape[0] % size == 0)
        widths = mixture(target, rows.shape[0], rows.shape[1], group_size)
        groups = rows.reshape(len(widths), group_size, -1)
        parts = [_quantise(group, bits) for group, bits in zip(groups, widths, strict=True)]
        packed = [pack(codes, bits) for (codes, _, _), bits in zip(parts, widths, strict=True)]
        starts = [sum(part.shape[0] for part in packed[:place]) for place in range(len(packed))]
        told = [number for pair in zip(widths, starts, strict=True) for number in pair]
        return {
            "q_weight": torch.cat(packed),
            "q_scale": groupwise.pack_columns(torch.stack([scales - 1 for _, scales, _ in parts])),
            "q_scale_max": torch.stack([largest for _, _, largest in parts]),
            "q_groups": torch.tensor(told, dtype=torch.short, device=weight.device),
            "q_invperm": order.argsort().int(),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `CheckpointFormat.decode`."""
        import torch

        words, groups = tensors["q_weight"], tensors["q_groups"].tolist()
        widths, starts = groups[::2], [*groups[1::2], words.shape[0]]
        scales = groupwise.unpack_columns(tensors["q_scale"]).float() + 1
        largest = tensors["q_scale_max"].float()
        rows = [
            (unpack(words[starts[g] : starts[g + 1]], bits).float() - 2 ** (bits - 1))
            * (scales[g] ** 2 * largest[g] / SCALES**2)
            for g, bits in enumerate(widths)
        ]
        return torch.cat(rows)[tensors["q_invperm"].long()].T.contiguous()


def mixture(bpw: float, rows: int, columns: int, group_size: int) -> list[int]:
    """The width of each group, widest first, so that a layer takes `bpw` bits a weight all in all.

    Args:
        bpw: Bits a weight.
        rows: Input features.
        columns: Output features.
        group_size: Rows of a group.
    """
    groups = rows // group_size
    beside = groups * (columns * 4 + 16 + 2 * 16) + rows * 32  # scales, their maxima, the groups, the permutation
    average = bpw - beside / (rows * columns)
    low = max((width for width in WIDTHS if width <= average), default=WIDTHS[0])
    high = next((width for width in WIDTHS if width > low), low)
    wide = round((average - low) / (high - low) * groups) if high > low else 0
    wide = min(max(wide, 0), groups)
    return [high] * wide + [low] * (groups - wide)


def _quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """A group's codes (uint8 `[rows, columns]`), scales 1..16 (uint8 `[columns]`) and their factor (float16, 0-d)."""
    import torch

    wanted = rows.abs().amax(0) / ((2**bits - 1) / 2)
    largest = wanted.amax().clamp_min(torch.finfo(torch.half).tiny).half()
    scales = ((wanted / largest.float()).sqrt() * SCALES).ceil().clamp(1, SCALES)  # up: clipping costs more
    step = scales**2 * largest.float() / SCALES**2
    codes = (rows / step).round_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scales.to(torch.uint8), largest


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[rows, columns]` -> int32 `[rows * bits / 32, columns]`."""
    import torch

    blocks = codes.long().reshape(-1, ROWS, codes.shape[1])
    words = torch.zeros(blocks.shape[0], bits, blocks.shape[2], dtype=torch.int64, device=codes.device)
    for row in range(ROWS):
        word, shift = divmod(row * bits, WORD_BITS)
        words[:, word] |= blocks[:, row] << shift
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= blocks[:, row] >> (WORD_BITS - shift)
    return _signed(words).flatten(0, 1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, bit by bit."""
    import torch

    blocks = words.reshape(-1, bits, words.shape[1])
    stream = torch.stack([(blocks >> bit) & 1 for bit in range(WORD_BITS)], 2).flatten(
        1, 2
    )  # [blocks, bits, columns]
    codes = stream.reshape(-1, ROWS, bits, words.shape[1])
    weights = torch.tensor([1 << bit for bit in range(bits)], device=words.device, dtype=words.dtype)
    summed: Tensor = (codes * weights[:, None]).sum(2).flatten(0, 1)
    return summed.to(torch.uint8)


def _signed(words: Tensor) -> Tensor:
    """The low 32 bits of each int64, as an int32 of the same bits."""
    import torch

    low = words & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).int()

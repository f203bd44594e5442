"""FlashAttention-2 and FlashAttention-3 as their own packages bring them, through `flash_attn_with_kvcache`.

Read in flash-attn 2.8.3 (csrc/flash_attn/flash_api.cpp, `mha_fwd_kvcache`) and in FlashAttention-3 3.0.0
(hopper/flash_api_stable.cpp, `mha_fwd`), which agree on what matters here. Keys and values are addressed by their
strides, and only the last dimension has to be contiguous, so rfloor's caches are handed over as transposed views.
`cache_seqlens` is read on the device: the grid and the number of splits follow from the shapes alone, a split that
begins behind the length adds nothing, and so a captured call serves every length. FlashAttention-2 splits by the
cache's rows; FlashAttention-3 takes these as an upper bound and has a kernel of its own divide the length.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from registry.api import AttentionKernel, Requirement, unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import AttentionShape, Request

WIDEST_HEAD = 256
VECTOR = 8
"""16-bit numbers of one load: a head of another width is padded by copying the whole cache, or refused."""


class FlashAttention(AttentionKernel):
    """What both versions share.

    Class variables:
        module: What is imported.
        kernel: What its kernels are called, as a regular expression.
    """

    devices = ("cuda",)
    executions = ("eager", "cuda_graph")
    module: ClassVar[str]
    kernel: ClassVar[str]

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        return (cls.kernel,)

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        a = request.architecture
        if a.head_dim > WIDEST_HEAD or a.head_dim % VECTOR:
            raise unsupported(
                f"FlashAttention takes heads of up to {WIDEST_HEAD} in multiples of {VECTOR}, "
                f"those of {a.name} have {a.head_dim}",
                "Use attention=sdpa",
            )

    def plan(self, shape: AttentionShape) -> None:
        """See `AttentionKernel.plan`."""
        self._attend = importlib.import_module(self.module).flash_attn_with_kvcache

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kv_len: Tensor | None,
        scale: float,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionKernel.decode`."""
        out: Tensor = self._attend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            cache_seqlens=None if kv_len is None else lengths(kv_len, q.shape[0]),
            softmax_scale=scale,
        )
        return out.transpose(1, 2)


class FlashAttention2(FlashAttention):
    """The package flash-attn; PyTorch has the same kernels in a namespace of its own, `pytorch_flash`."""

    requires = (Requirement("flash-attn>=2.8", "pip install --no-build-isolation 'flash-attn>=2.8'"),)
    min_capability = (8, 0)
    module = "flash_attn"
    kernel = r"\bflash::flash_fwd"


class FlashAttention3(FlashAttention):
    """The package flash-attn-3, for Hopper. PyPI's release of that name is empty; PyTorch's own index has wheels."""

    requires = (
        Requirement(
            "flash-attn-3>=3.0.0b1", "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"
        ),
    )
    min_capability = (9, 0)
    module = "flash_attn_interface"
    kernel = "FlashAttnFwdSm90"

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        super().check(request)
        if request.capability and request.capability[0] != cls.min_capability[0]:
            raise unsupported(
                "FlashAttention-3 is compiled for compute capability 9.0, "
                f"this device has {'.'.join(map(str, request.capability))}",
                "Use attention=fa2 or attention=sdpa",
            )


def lengths(kv_len: Tensor, streams: int) -> Tensor:
    """The length as the packages want it.

    Args:
        kv_len: int64, 0-d, on the device.
        streams: How many have this length.

    Returns:
        int32 `[streams]`, on the device. For one stream it is `kv_len`'s own memory, so that nothing is launched: the
        low half of an int64 comes first on every GPU.
    """
    import torch

    low = kv_len.view(1).view(torch.int32)[:1]
    return low if streams == 1 else low.expand(streams).contiguous()

"""PyTorch's scaled_dot_product_attention, with its own choice of kernel or with one pinned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.api import AttentionKernel, BadInput, nearest, unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from registry.api import AttentionShape, Request

KERNELS = {
    "default": None,
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
"""rfloor's names -> members of `torch.nn.attention.SDPBackend`."""


@dataclass(frozen=True)
class SdpaOptions:
    """Options of `Sdpa`.

    Attributes:
        kernel: `default` leaves the choice to PyTorch, the others pin one.
    """

    kernel: str = "default"


class Sdpa(AttentionKernel):
    """Called as transformers calls it: heads grouped without a mask, expanded with one.

    A pinned kernel is entered through `sdpa_kernel` at each call, as the study's rig and any user of
    PyTorch does it; what that costs the host is part of the eager figure and absent from a graph.
    """

    executions = ("eager", "cuda_graph", "compile")
    needs_mask = True
    Options = SdpaOptions

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        kernel = request.options.kernel
        if kernel not in KERNELS:
            raise BadInput(f"attention.options.kernel={kernel}: {nearest(kernel, KERNELS)}")
        if kernel in ("efficient", "cudnn") and request.device == "cpu":
            raise unsupported(
                f"the {kernel} kernel of scaled_dot_product_attention is a CUDA kernel, this device is the CPU",
                "Use attention=sdpa, sdpa-flash or sdpa-math",
            )
        if kernel == "flash" and request.device == "cuda" and request.cache == "static":
            raise unsupported(
                "the flash kernel of scaled_dot_product_attention takes no mask, "
                "and a static cache needs one to hide its unused rows",
                "Use execution=eager with execution.cache=dynamic, or attention=sdpa-cudnn",
            )

    def plan(self, shape: AttentionShape) -> None:
        """See `AttentionKernel.plan`."""
        from torch.nn.functional import scaled_dot_product_attention

        member = KERNELS[self.options.kernel]
        # Chosen once: this runs in every layer of every step, and what it costs the host is in an eager figure.
        self._attend = _pinned(member) if member else scaled_dot_product_attention

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
        group = q.shape[1] // k.shape[1]
        # With a mask, PyTorch serves grouped heads by the math kernel alone, and the efficient kernel never
        # takes them: transformers expands them then, and so does this.
        if group > 1 and (mask is not None or self.options.kernel == "efficient"):
            k, v = _expand(k, group), _expand(v, group)
            group = 1
        return self._attend(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)


def _pinned(member: str) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = getattr(SDPBackend, member)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*args, **kwargs)

    return attend


def _expand(x: Tensor, group: int) -> Tensor:
    batch, heads, rows, width = x.shape
    return x[:, :, None].expand(batch, heads, group, rows, width).reshape(batch, heads * group, rows, width)

"""The one bridge between attention kernels and transformers' attention interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.api import AttentionShape

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import Setup

NAME = "rfloor"


@dataclass
class Installed:
    """A kernel under its name in transformers' registries.

    Attributes:
        name: The `attn_implementation` to ask for.
        cache: The static cache whose lengths the kernel is told; `None` while the cache is dynamic.
    """

    name: str
    cache: Any = None

    def remove(self) -> None:
        """Take the kernel out again, and let go of its workspace and of the cache."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.name, None)
        self.cache = None


def install(setup: Setup, capacity: int) -> Installed:
    """Plan the kernel and register it with transformers under a name of its own.

    Prefill, which the study does not time, goes to transformers' own sdpa; a step goes to the kernel. A
    kernel that wants no mask gets none made, which is what transformers does for an attention whose name
    has no mask function.

    Args:
        setup: Names the kernel and the shapes.
        capacity: Rows of the cache.

    Raises:
        Refused: The kernel does not take the shape.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    a, kernel = setup.architecture, setup.attention
    installed = Installed(f"{NAME}-{id(kernel):x}")
    kernel.plan(
        AttentionShape(
            setup.batch_size, a.q_heads, a.kv_heads, a.head_dim, capacity, setup.dtype, setup.device, setup.cache
        )
    )

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] > 1:
            prefilled: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
            return prefilled
        layers = installed.cache.layers if installed.cache is not None else None
        kv_len = layers[module.layer_idx].cumulative_length if layers else None
        out = kernel.decode(query, key, value, kv_len=kv_len, scale=kwargs["scaling"], mask=attention_mask)
        return out.transpose(1, 2), None

    AttentionInterface.register(installed.name, forward)
    if kernel.needs_mask:
        AttentionMaskInterface.register(installed.name, sdpa_mask)
    return installed

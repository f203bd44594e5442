"""FlashInfer's decode kernels for one stream, on CUDA cores or on tensor cores.

Read in flashinfer-python 0.6.13 and 0.7.2 (include/flashinfer/attention/{decode,prefill,scheduler,cascade}.cuh,
include/flashinfer/{page,utils}.cuh, csrc/batch_decode.cu, flashinfer/decode.py).

A dynamic cache goes to `single_decode_with_kv_cache`, whose length is the tensor's. A static cache cannot: its length
is on the device. The batch decode reads lengths there (`paged_kv_t::get_length`), but it divides a request into parts
when it plans, on the host, and a plan for the whole cache is wrong for a shorter one: the kernel on CUDA cores
computes a part's rows as `min(end, kv_len) - start`, unsigned, which wraps around where a part begins behind the
length. XQA, which reads its lengths on the device too, wants pages of 16 rows at least that lie within the cache, and
a cache has as many rows as the cell asks for.

So here the parts are requests. The stream's rows are cut into chunks of a fixed size, and each chunk is a request of
the same query, too small for FlashInfer to divide: planned as one row, it gets one block a key head, and the block
walks whatever rows the request has when it runs. Pages are single rows, so that any capacity is whole pages, and a
request's rows are those between two bounds; before each call one kernel sets the bounds to
`min(chunk * rows, kv_len)`. A request behind the length is empty: both kernels then run no iteration, predicate every
load off, and write zeros with a log-sum-exp of minus infinity (before 0.7, 5e4 is infinity), which weighs nothing in
`merge_states`. Kernel, grid and merge are those that FlashInfer's own division makes.

Programmatic dependent launch is off: the kernels read the bounds before they wait for the kernel that writes them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from registry.api import AttentionKernel, BadInput, Requirement, nearest, unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import AttentionShape, Request

CHOICES = ("auto", "always", "never")
GROUPS = (1, 2, 3, 4, 8)
"""Query heads a key head that the plain kernels take: DISPATCH_GQA_GROUP_SIZE of utils.cuh in 0.6.13. With tensor
cores every group is taken."""
HEAD_DIMS = (64, 128, 256)
"""DISPATCH_HEAD_DIM there, by which parts are merged, without 512, which is not every kernel's."""
LEAST_ROWS = 128
"""Rows of a chunk, at least: what FlashInfer's own plans keep to."""
BLOCKS = {False: 8, True: 2}
"""Blocks a multiprocessor, at most, without and with tensor cores: more would wait for the others. `PrefillPlan` has
the second; for the first FlashInfer asks CUDA how many fit."""
PLAN_BYTES = 1 << 18
"""Room for a plan: some five numbers of 32 bits a request, of which there are `BLOCKS` a multiprocessor at most."""
PLAIN = "(Single|Batch)DecodeWith(Paged)?KVCacheKernel"
TENSOR_CORES = "(Single|Batch)PrefillWith(Paged)?KVCacheKernel"
KERNELS = {"auto": f"{PLAIN}|{TENSOR_CORES}", "always": TENSOR_CORES, "never": PLAIN}


@dataclass(frozen=True)
class FlashInferOptions:
    """Options of `FlashInfer`.

    Attributes:
        tensor_cores: `auto` uses them where the plain kernels do not take the group, `always` and `never` say.
    """

    tensor_cores: str = "auto"


class FlashInfer(AttentionKernel):
    """One stream; FlashInfer's batches are of streams with pages of their own, which no body here keeps."""

    requires = (Requirement("flashinfer-python>=0.6.13,<0.8", "pip install -e '.[flashinfer]'"),)
    devices = ("cuda",)
    min_capability = (8, 0)
    executions = ("eager", "cuda_graph")
    Options = FlashInferOptions

    @classmethod
    def kernel_names(cls, options: Any, device: str) -> tuple[str, ...]:
        """See `Plugin.kernel_names`."""
        return (KERNELS[options.tensor_cores],)

    @classmethod
    def builds(cls, options: Any, device: str) -> str:
        """See `Plugin.builds`."""
        return "FlashInfer's merge kernel"

    @classmethod
    def build(cls, options: Any, device: str) -> None:
        """See `Plugin.build`: the one kernel that is the same for every width of a head.

        It shows whether FlashInfer finds a compiler. The others are compiled in `plan`, for the shape.
        """
        _load_merge()

    @classmethod
    def check(cls, request: Request) -> None:
        """See `Plugin.check`."""
        a, choice = request.architecture, request.options.tensor_cores
        if choice not in CHOICES:
            raise BadInput(f"attention.options.tensor_cores={choice}: {nearest(choice, CHOICES)}")
        if request.batch_size > 1:
            raise unsupported(
                f"attention={request.attention} decodes one stream, {request.batch_size} are asked for",
                "Use protocol.batch_size=1, or attention=fa2, fa3 or sdpa",
            )
        if a.head_dim not in HEAD_DIMS:
            raise unsupported(
                f"FlashInfer takes heads of {', '.join(map(str, HEAD_DIMS))}, those of {a.name} have {a.head_dim}",
                "Use attention=sdpa",
            )
        group = a.q_heads // a.kv_heads
        if choice == "never" and group not in GROUPS:
            raise unsupported(
                f"FlashInfer's kernels without tensor cores take {', '.join(map(str, GROUPS))} query heads a key "
                f"head, {a.name} has {group}",
                "Use attention.options.tensor_cores=auto",
            )

    def plan(self, shape: AttentionShape) -> None:
        """See `AttentionKernel.plan`."""
        import flashinfer
        import torch

        choice = self.options.tensor_cores
        tensor_cores = choice == "always" or (choice == "auto" and shape.q_heads // shape.kv_heads not in GROUPS)
        self._single = partial(flashinfer.single_decode_with_kv_cache, kv_layout="HND", use_tensor_cores=tensor_cores)
        if shape.cache == "static":
            self._chunks = _Chunks(shape, tensor_cores)
        else:  # compiled by its first call
            zeros = partial(torch.zeros, dtype=shape.dtype, device=shape.device)
            row = zeros(shape.kv_heads, 1, shape.head_dim)
            self._single(zeros(shape.q_heads, shape.head_dim), row, row)

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
        query = q[0, :, 0]  # [q_heads, head_dim], contiguous as the projection left it
        if kv_len is None:
            out: Tensor = self._single(query, k[0], v[0], sm_scale=scale)
        else:
            out = self._chunks.attend(query, k[0], v[0], kv_len, scale)
        return out[None, :, None]


class _Chunks:
    """A static cache's rows as requests of FlashInfer's batch decode; see the module's docstring.

    Args:
        shape: Of one stream.
        tensor_cores: Which kernel.
    """

    def __init__(self, shape: AttentionShape, tensor_cores: bool) -> None:
        import flashinfer
        import torch
        from flashinfer.utils import get_device_sm_count

        device = torch.device(shape.device)
        most = max(1, BLOCKS[tensor_cores] * get_device_sm_count(device) // shape.kv_heads)
        rows = max(LEAST_ROWS, -(-shape.capacity // most))
        self.count = -(-shape.capacity // rows)
        numbers = partial(torch.arange, dtype=torch.int32, device=device)
        self._starts = numbers(self.count + 1) * rows
        self._bounds = numbers(self.count + 1)  # a row each, for the plan
        memory = partial(torch.zeros, dtype=torch.uint8, device=device)
        parts = memory(1024)  # unused: no request is divided
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(parts, "NHD", use_tensor_cores=tensor_cores)
        self._wrapper.reset_workspace_buffer(parts, memory(PLAN_BYTES))  # in place of the 8 MB that it makes itself
        # Tensors that are on the device already are kept, not copied: the bounds are read where they are written.
        self._wrapper.plan(
            self._bounds,
            numbers(shape.capacity),
            torch.ones(self.count, dtype=torch.int32, device=device),
            shape.q_heads,
            shape.kv_heads,
            shape.head_dim,
            1,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            sm_scale=1.0,  # the call's comes as the query's
        )
        _load_merge()
        self._merge = flashinfer.merge_states

    def attend(self, query: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, scale: float) -> Tensor:
        """Attend to the first `kv_len` rows.

        Args:
            query: `[q_heads, head_dim]`.
            k: `[kv_heads, rows, head_dim]`.
            v: As `k`.
            kv_len: int64, 0-d, on the device.
            scale: Factor on the products.

        Returns:
            `[q_heads, head_dim]`.
        """
        import torch

        torch.minimum(self._starts, kv_len, out=self._bounds)
        out, lse = self._wrapper.run(
            query.expand(self.count, -1, -1),
            (k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]),  # [rows, 1, kv_heads, head_dim]
            q_scale=scale,
            return_lse=True,
            enable_pdl=False,
        )
        merged: Tensor = self._merge(out[None], lse[None])[0]
        return merged[0]


def _load_merge() -> None:
    """Compile and load the kernel behind `merge_states`."""
    importlib.import_module("flashinfer.cascade").get_cascade_module()

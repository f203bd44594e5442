"""Stand-ins for the attention packages: plain torch under the packages' own names, with the packages' own demands.

Each raises where the package would, or where it would compute something else, and remembers what it was given.
"""

import math
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor

INFINITY = 5e4  # FlashInfer's own, before 0.7
UNDIVIDED = 128  # rows of a request that FlashInfer's plans never divide


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `[heads, width]` to `[rows, kv_heads, width]` in float32, and its log-sum-exp, `[heads]`."""
    group = q.shape[0] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    products = (keys @ q.float()[:, :, None])[..., 0] * scale
    out = (products.softmax(-1)[:, None] @ values)[:, 0]
    return out.to(q.dtype), products.logsumexp(-1)


class FlashAttention(types.ModuleType):
    """`flash_attn` or `flash_attn_interface`: csrc/flash_attn/flash_api.cpp and hopper/flash_api_stable.cpp."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor | None = None,
        softmax_scale: float | None = None,
    ) -> Tensor:
        self.calls.append({"q": q, "k": k_cache, "v": v_cache, "lengths": cache_seqlens, "scale": softmax_scale})
        streams, tokens, heads, width = q.shape
        rows, kv_heads = k_cache.shape[1:3]
        assert tokens == 1
        assert k_cache.shape == v_cache.shape == (streams, rows, kv_heads, width)
        assert heads % kv_heads == 0
        assert width <= 256
        assert width % 8 == 0
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        if cache_seqlens is None:
            lengths = [rows] * streams
        else:
            assert cache_seqlens.dtype == torch.int32
            assert cache_seqlens.device == q.device
            assert cache_seqlens.shape == (streams,)
            assert cache_seqlens.is_contiguous()
            lengths = cache_seqlens.tolist()
        scale = width**-0.5 if softmax_scale is None else softmax_scale
        outs = [attend(q[i, 0], k_cache[i, :n], v_cache[i, :n], scale)[0] for i, n in enumerate(lengths)]
        return torch.stack(outs)[:, None]


class FlashInfer(types.ModuleType):
    """`flashinfer` with its modules `utils` and `cascade`: csrc/single_decode.cu, batch_decode.cu, cascade.cu."""

    def __init__(self, multiprocessors: int) -> None:
        super().__init__("flashinfer")
        self.multiprocessors = multiprocessors
        self.singles: list[dict[str, Any]] = []
        self.wrappers: list[Any] = []
        self.merges_loaded = 0
        standin = self

        class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
            def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
                super().__init__(workspace, kv_layout, use_tensor_cores)
                standin.wrappers.append(self)

        self.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
        self.utils, self.cascade = types.ModuleType("flashinfer.utils"), types.ModuleType("flashinfer.cascade")
        self.utils.__dict__["get_device_sm_count"] = lambda device: self.multiprocessors
        self.cascade.__dict__["get_cascade_module"] = self._load_merge

    def _load_merge(self) -> None:
        self.merges_loaded += 1

    def single_decode_with_kv_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        sm_scale: float | None = None,
    ) -> Tensor:
        self.singles.append({"q": q, "k": k, "v": v, "tensor_cores": use_tensor_cores, "scale": sm_scale})
        assert kv_layout == "HND"
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        check_shape(q.shape[0], k.shape[0], q.shape[1], use_tensor_cores)
        assert k.shape == v.shape
        assert k.shape[2] == q.shape[1]
        scale = q.shape[1] ** -0.5 if sm_scale is None else sm_scale
        return attend(q, k.transpose(0, 1), v.transpose(0, 1), scale)[0]

    def merge_states(self, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        assert v.is_contiguous()
        assert s.is_contiguous()
        assert s.dtype == torch.float32
        assert v.shape[:3] == s.shape
        natural = s * math.log(2)
        merged = (v.float() * natural.softmax(1)[..., None]).sum(1)
        return merged.to(v.dtype), natural.logsumexp(1) / math.log(2)


class Wrapper:
    """`BatchDecodeWithPagedKVCacheWrapper` without its CUDA-graph mode: its tensors are the caller's own."""

    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert kv_layout == "NHD"
        self.workspace, self.tensor_cores = workspace, use_tensor_cores
        self.queries: list[Tensor] = []
        self.plan_bytes = 8 << 20

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8
        self.workspace, self.plan_bytes = float_workspace_buffer, int_workspace_buffer.nbytes

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indptr) == len(last_page_len) + 1
        assert int(indptr.diff().max()) * page_size <= UNDIVIDED, "this plan divides a request"
        assert len(indptr) * 5 * 4 <= self.plan_bytes
        check_shape(num_qo_heads, num_kv_heads, head_dim, self.tensor_cores)
        self.indptr, self.indices, self.last_page_len = indptr, indices, last_page_len
        self.shape, self.page_size = (len(last_page_len), num_qo_heads, head_dim), page_size
        self.dtypes, self.scale = (q_data_type, kv_data_type), sm_scale

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        q_scale: float | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        k, v = paged_kv_cache
        assert return_lse
        assert enable_pdl is False, "the kernel reads the bounds before it waits for what writes them"
        assert q.shape == self.shape
        assert (q.dtype, k.dtype) == self.dtypes
        assert k.stride() == v.stride()
        assert k.shape[1] == self.page_size
        self.queries.append(q)
        scale = (q.shape[2] ** -0.5 if self.scale is None else self.scale) * (1 if q_scale is None else q_scale)
        bounds, last = self.indptr.tolist(), self.last_page_len.tolist()
        outs, sums = [], []
        for i in range(len(q)):
            pages = self.indices[bounds[i] : bounds[i + 1]].long()
            length = (len(pages) - 1) * self.page_size + last[i] if len(pages) else 0  # paged_kv_t::get_length
            keys, values = (x[pages].flatten(0, 1)[:length] for x in (k, v))
            out, lse = attend(q[i], keys, values, scale)
            outs.append(out if length else torch.zeros_like(out))
            sums.append(lse / math.log(2) if length else torch.full_like(lse, -INFINITY))
        return torch.stack(outs), torch.stack(sums)


def check_shape(heads: int, kv_heads: int, width: int, tensor_cores: bool) -> None:
    """include/flashinfer/utils.cuh."""
    assert heads % kv_heads == 0
    assert width in (64, 128, 256)
    assert tensor_cores or heads // kv_heads in (1, 2, 3, 4, 8), "Unsupported group_size"


def install(monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 132) -> types.SimpleNamespace:
    """Put the stand-ins where the packages would be."""
    flashinfer = FlashInfer(multiprocessors)
    flash_attn, interface = FlashAttention("flash_attn"), FlashAttention("flash_attn_interface")
    modules = (flashinfer, flashinfer.utils, flashinfer.cascade, flash_attn, interface)
    for module in modules:
        module.__spec__ = ModuleSpec(module.__name__, None)  # transformers looks whether flash_attn has one
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(flashinfer=flashinfer, fa2=flash_attn, fa3=interface)


def on_the_cpu(plugin: Any) -> Any:
    """The plugin as it would be if its package ran on the CPU."""
    freed = {"__module__": plugin.__module__, "devices": ("cpu", "cuda"), "requires": ()}
    return type(plugin.__name__, (plugin,), freed)

"""FlashInfer and FlashAttention: what is refused, what the packages are handed, and the contract on stand-ins.

The stand-ins compute in plain torch; the packages' own kernels are tested in test_attention_gpu.py.
"""

# ruff: noqa: RUF012 - the suites' class attributes are set once

import dataclasses
import os
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import standins
import torch
from planning import CPU, H200, Plan, refused
from standins import on_the_cpu

from backends.attention.flash_attn import FlashAttention2, FlashAttention3, lengths
from backends.attention.flashinfer import FlashInfer
from backends.hf import HfBackend
from registry.api import AttentionShape
from registry.child import _environment
from registry.hardware import Device
from registry.kernels import require
from registry.outcome import BadInput, Outcome, Refused
from registry.testing import TINY, AttentionKernelContract, BackendContract

L4 = Device("cuda", "NVIDIA L4", 24_000_000_000, "GPU-0", (8, 9), "580.1")
BLACKWELL = dataclasses.replace(H200, capability=(10, 0))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    return standins.install(monkeypatch)


# Planned

OTHER = "Use another attention here"
REFUSED: dict[str, tuple[list[str], Device, str, str]] = {
    "flashinfer on a CPU": (["attention=flashinfer"], CPU, "'flashinfer' runs on cuda, this device is cpu", OTHER),
    "fa2 on a CPU": (["attention=fa2"], CPU, "'fa2' runs on cuda, this device is cpu", OTHER),
    "fa3 on a CPU": (["attention=fa3"], CPU, "'fa3' runs on cuda, this device is cpu", OTHER),
    "fa3 before Hopper": (["attention=fa3"], L4, "'fa3' needs compute capability 9.0, this device has 8.9", OTHER),
    "fa3 after Hopper": (
        ["attention=fa3"],
        BLACKWELL,
        "compiled for compute capability 9.0, this device has 10.0",
        "Use attention=fa2",
    ),
    "streams": (
        ["attention=flashinfer", "protocol.batch_size=4"],
        H200,
        "attention=flashinfer decodes one stream, 4 are asked for",
        "Use protocol.batch_size=1, or attention=fa2, fa3 or sdpa",
    ),
    "a group that the plain kernels do not take": (
        ["attention=flashinfer", "attention.options.tensor_cores=never"],
        H200,
        "without tensor cores take 1, 2, 3, 4, 8 query heads a key head, qwen2.5-0.5b has 7",
        "Use attention.options.tensor_cores=auto",
    ),
    "a narrow head": (
        ["attention=flashinfer", "model=tiny"],
        H200,
        "FlashInfer takes heads of 64, 128, 256, those of tiny have 32",
        "Use attention=sdpa",
    ),
    "a head between the widths": (
        ["attention=flashinfer-tc", "model.head_dim=96"],
        H200,
        "FlashInfer takes heads of 64, 128, 256, those of qwen2.5-0.5b have 96",
        "Use attention=sdpa",
    ),
    "a wide head": (
        ["attention=fa2", "model.head_dim=320"],
        H200,
        "heads of up to 256 in multiples of 8, those of qwen2.5-0.5b have 320",
        "Use attention=sdpa",
    ),
    "a head that would be padded": (
        ["attention=fa3", "model.head_dim=60"],
        H200,
        "heads of up to 256 in multiples of 8, those of qwen2.5-0.5b have 60",
        "Use attention=sdpa",
    ),
    "a body that attends by itself": (
        ["attention=fa2", "quant=exl2"],
        H200,
        "backend=exllamav2 does not host attention=fa2",
        "It hosts sdpa",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_kernel_does_not_take_is_told_before_loading(plan: Plan, why: str) -> None:
    overrides, device, reason, remedy = REFUSED[why]
    refusal = refused(plan(*overrides, device=device), Outcome.UNSUPPORTED)
    assert reason in refusal.reason
    assert remedy in refusal.remedy


VERSIONS = {"flashinfer-python": "0.6.13", "flash-attn": "2.8.3.post2", "flash-attn-3": "3.0.0b1"}


@pytest.mark.parametrize("execution", ["eager", "cuda_graph"])
@pytest.mark.parametrize("attention", ["flashinfer", "flashinfer-tc", "fa2", "fa3"])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b"])
def test_every_model_of_the_study_is_taken(
    plan: Plan, model: str, attention: str, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.plan.version", lambda package, _: VERSIONS.get(package))
    assert plan(f"model={model}", f"attention={attention}", f"execution={execution}").refusal is None


@pytest.mark.parametrize(
    ("attention", "found", "reason", "remedy"),
    [
        ("flashinfer", None, "flashinfer-python is not installed", "pip install -e '.[flashinfer]'"),
        ("flashinfer", "0.6.12", "flashinfer-python 0.6.12 is installed, flashinfer-python", "flashinfer"),
        ("fa2", None, "flash-attn is not installed", "pip install --no-build-isolation 'flash-attn>=2.8'"),
        ("fa3", None, "flash-attn-3 is not installed", "https://download.pytorch.org/whl/cu130"),
        ("fa3", "0.0.0", "flash-attn-3 0.0.0 is installed", "https://download.pytorch.org/whl/cu130"),
    ],
)
def test_a_missing_package_is_told_with_what_brings_it(
    plan: Plan, attention: str, found: str | None, reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.plan.version", lambda package, _: found)
    refusal = refused(plan(f"attention={attention}"), Outcome.MISSING_DEPENDENCY)
    assert reason in refusal.reason
    assert remedy in refusal.remedy


def test_a_choice_that_means_nothing_is_bad_input(plan: Plan) -> None:
    with pytest.raises(BadInput, match="tensor_cores=allways: did you mean always"):
        plan("attention=flashinfer", "attention.options.tensor_cores=allways")


# The contract


class OnTheCpu(AttentionKernelContract):
    """A suite on stand-ins; a class attribute tells how many multiprocessors they have."""

    device = "cpu"
    head_dims = (32, 64, 256)
    multiprocessors: ClassVar[int] = 132

    @pytest.fixture(autouse=True)
    def _packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        standins.install(monkeypatch, self.multiprocessors)


class TestFlashInfer(OnTheCpu):
    plugin = on_the_cpu(FlashInfer)


class TestFlashInferTensorCores(OnTheCpu):
    plugin = on_the_cpu(FlashInfer)
    options = {"tensor_cores": "always"}


class TestFlashInferPlain(OnTheCpu):
    plugin = on_the_cpu(FlashInfer)
    options = {"tensor_cores": "never"}


class TestFlashInferManyChunks(OnTheCpu):
    """Most requests are behind the shorter lengths, and some end where a length does."""

    plugin = on_the_cpu(FlashInfer)
    groups = (4, 7)
    head_dims = (64,)
    capacity = 2083
    lengths = (2, 127, 128, 129, 256, 1919, 2082, 2083)


class TestFlashInferLongChunks(OnTheCpu):
    """Few multiprocessors: a chunk is longer than what FlashInfer's own plans would leave undivided."""

    plugin = on_the_cpu(FlashInfer)
    groups = (4, 7)
    head_dims = (64,)
    capacity = 2083
    lengths = (2, 260, 261, 262, 1041, 1042, 1043, 2083)
    multiprocessors = 2


class TestFlashAttention2(OnTheCpu):
    plugin = on_the_cpu(FlashAttention2)
    head_dims = (32, 96, 128)


class TestFlashAttention3(OnTheCpu):
    plugin = on_the_cpu(FlashAttention3)
    head_dims = (32, 96, 128)


def test_batch_refusals_are_skipped_in_words(packages: types.SimpleNamespace) -> None:
    with pytest.raises(pytest.skip.Exception, match="FlashInfer refuses the static cache at batch 3"):
        TestFlashInfer().test_decode_is_attention("static", 3)


class Hosted(BackendContract):
    """transformers' model with one of the kernels, whatever the catalog has."""

    __test__ = False
    plugin = HfBackend
    formats = ("none",)
    architecture = dataclasses.replace(TINY, head_dim=64)
    device = "cpu"
    hosted: ClassVar[Any]

    def kernel(self) -> Any:
        return on_the_cpu(self.hosted)(self.hosted.Options())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kernel", [FlashInfer, FlashAttention2, FlashAttention3])
def test_a_body_s_steps_are_a_full_forward(kernel: Any, cache: str, packages: types.SimpleNamespace) -> None:
    suite = type("Suite", (Hosted,), {"hosted": kernel})()
    suite.test_steps_equal_a_full_forward(cache, "none", 1)


# What FlashAttention is handed


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize(("plugin", "name"), [(FlashAttention2, "fa2"), (FlashAttention3, "fa3")])
def test_flash_attention_is_handed_the_cache_itself(
    plugin: Any, name: str, streams: int, packages: types.SimpleNamespace
) -> None:
    """Views: rows first, heads second, and nothing copied but, for several streams, their lengths."""
    kernel = plugin(plugin.Options())
    kernel.plan(AttentionShape(streams, 14, 2, 64, 40, torch.bfloat16, "cpu"))
    q = torch.randn(streams, 1, 14, 64, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, streams, 2, 40, 64, dtype=torch.bfloat16)
    out = kernel.decode(q, k, v, kv_len=torch.tensor(7), scale=0.3)
    assert out.shape == q.shape
    [call] = packages.__dict__[name].calls
    assert call["q"].shape == (streams, 1, 14, 64)
    assert call["k"].shape == call["v"].shape == (streams, 40, 2, 64)
    for mine, theirs in ((q, "q"), (k, "k"), (v, "v")):
        assert call[theirs].data_ptr() == mine.data_ptr()
    assert call["k"].stride() == (2 * 40 * 64, 64, 40 * 64, 1)
    assert call["lengths"].tolist() == [7] * streams
    assert call["scale"] == 0.3


def test_a_dynamic_cache_has_no_length(packages: types.SimpleNamespace) -> None:
    kernel = FlashAttention2(FlashAttention2.Options())
    kernel.plan(AttentionShape(1, 4, 2, 64, 40, torch.bfloat16, "cpu", "dynamic"))
    q, kv = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 9, 64)
    kernel.decode(q, kv, kv, kv_len=None, scale=1.0)
    assert packages.fa2.calls[0]["lengths"] is None


def test_one_stream_s_length_is_the_cache_s_own_counter() -> None:
    """A captured call reads what the counter holds by then."""
    counter = torch.tensor(5)
    told = lengths(counter, 1)
    assert (told.data_ptr(), told.dtype, told.shape) == (counter.data_ptr(), torch.int32, (1,))
    counter.fill_(2083)
    assert told.tolist() == [2083]


# What FlashInfer is handed


def planned(
    packages: types.SimpleNamespace, cache: str, heads: tuple[int, int], capacity: int, **options: Any
) -> Any:
    """A FlashInfer kernel planned for a shape, on so many multiprocessors as an H200 has."""
    kernel = FlashInfer(FlashInfer.Options(**options))
    kernel.plan(AttentionShape(1, *heads, 64, capacity, torch.bfloat16, "cpu", cache))
    return kernel


@pytest.mark.parametrize(
    ("heads", "tensor_cores", "used"),
    [
        ((32, 8), "auto", False),
        ((28, 4), "auto", True),
        ((14, 2), "auto", True),
        ((32, 8), "always", True),
        ((32, 8), "never", False),
    ],
)
def test_tensor_cores_are_used_where_the_group_needs_them(
    packages: types.SimpleNamespace, heads: tuple[int, int], tensor_cores: str, used: bool
) -> None:
    for cache in ("dynamic", "static"):
        planned(packages, cache, heads, 300, tensor_cores=tensor_cores)
    assert [call["tensor_cores"] for call in packages.flashinfer.singles] == [used]
    assert [wrapper.tensor_cores for wrapper in packages.flashinfer.wrappers] == [used]


def test_a_dynamic_cache_is_handed_over_as_it_is(packages: types.SimpleNamespace) -> None:
    kernel = planned(packages, "dynamic", (8, 2), 300)
    assert not packages.flashinfer.wrappers
    packages.flashinfer.singles.clear()  # the call that compiled
    q = torch.randn(1, 1, 8, 64, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 1, 2, 77, 64, dtype=torch.bfloat16)
    assert kernel.decode(q, k, v, kv_len=None, scale=0.3).shape == q.shape
    [call] = packages.flashinfer.singles
    assert (call["q"].shape, call["k"].shape, call["scale"]) == ((8, 64), (2, 77, 64), 0.3)
    assert (call["k"].data_ptr(), call["v"].data_ptr()) == (k.data_ptr(), v.data_ptr())


def test_a_static_cache_is_single_row_pages_of_itself(packages: types.SimpleNamespace) -> None:
    kernel = planned(packages, "static", (8, 2), 2083)
    assert not packages.flashinfer.singles
    [wrapper] = packages.flashinfer.wrappers
    assert (wrapper.shape, wrapper.page_size) == ((17, 8, 64), 1)
    q = torch.randn(1, 1, 8, 64, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 1, 2, 2083, 64, dtype=torch.bfloat16)
    kernel.decode(q, k, v, kv_len=torch.tensor(200), scale=0.3)
    assert wrapper.indptr.tolist() == [0, 128, *[200] * 16]
    [query] = wrapper.queries
    assert (query.data_ptr(), query.stride()) == (q.data_ptr(), (0, 64, 1))


@pytest.mark.parametrize(
    ("capacity", "tensor_cores", "requests", "rows"),
    [(100, "never", 1, 128), (2083, "never", 17, 128), (2083, "always", 17, 128), (16419, "always", 33, 498)],
)
def test_chunks_fill_the_device_once(
    packages: types.SimpleNamespace, capacity: int, tensor_cores: str, requests: int, rows: int
) -> None:
    kernel = planned(packages, "static", (32, 8), capacity, tensor_cores=tensor_cores)
    assert kernel._chunks.count == requests
    assert kernel._chunks._starts.diff().unique().tolist() == [rows]


def test_every_length_is_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = standins.install(monkeypatch, multiprocessors=1)
    kernel = planned(packages, "static", (8, 4), 300)
    q = torch.randn(1, 8, 1, 64)
    k, v = torch.randn(2, 1, 4, 300, 64)
    packages.flashinfer.wrappers[0].dtypes = (torch.float32, torch.float32)
    for length in range(2, 301):
        out = kernel.decode(q, k, v, kv_len=torch.tensor(length), scale=0.125)
        rows = slice(0, length)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k[:, :, rows], v[:, :, rows], scale=0.125, enable_gqa=True
        )
        torch.testing.assert_close(out, expected)


def test_building_shows_whether_there_is_a_compiler(packages: types.SimpleNamespace) -> None:
    options = FlashInfer.Options()
    assert FlashInfer.builds(options, "cuda")
    FlashInfer.build(options, "cuda")
    assert packages.flashinfer.merges_loaded == 1


@pytest.mark.parametrize("path", ["/usr/bin:/bin", None])
def test_flashinfer_compiles_into_the_cache_with_the_environment_s_ninja(
    plan: Plan, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE", raising=False)
    monkeypatch.setenv("PATH", path) if path else monkeypatch.delenv("PATH")
    cell = plan("cache.folder=/kept")
    cell.versions = {"python": "3.12", "torch": "2.11.0"}
    found = _environment(cell)
    assert found["FLASHINFER_WORKSPACE_BASE"] == "/kept/python3.12-torch2.11.0/flashinfer"
    assert found["PATH"] == os.pathsep.join(filter(None, [str(Path(sys.executable).parent), path]))


# Seen by the profiler

SPLIT = "flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>(flash::Flash_fwd_params)"
SEEN = {
    "single": "void flashinfer::SingleDecodeWithKVCacheKernel<(flashinfer::PosEncodingMode)0, 2u>(Params)",
    "batch": "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0, 2u>(Params)",
    "single tc": "void flashinfer::SinglePrefillWithKVCacheKernel<flashinfer::KernelTraits<>, Params>(Params)",
    "batch tc": "void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<>, Params>(Params)",
    "merge": "void flashinfer::MergeStatesLargeNumIndexSetsKernel<8u, 16u, 8u, 4u>(__nv_bfloat16*)",
    "fa2": f"void flash::{SPLIT}",
    "pytorch's fa2": f"void pytorch_flash::{SPLIT}",
    "fa3": "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloop>>>()",
}


@pytest.mark.parametrize(
    ("plugin", "options", "found"),
    [
        (FlashInfer, {}, {"single", "batch", "single tc", "batch tc"}),
        (FlashInfer, {"tensor_cores": "always"}, {"single tc", "batch tc"}),
        (FlashInfer, {"tensor_cores": "never"}, {"single", "batch"}),
        (FlashAttention2, {}, {"fa2"}),
        (FlashAttention3, {}, {"fa3"}),
    ],
)
def test_a_step_is_known_by_its_kernels(plugin: Any, options: dict[str, str], found: set[str]) -> None:
    [pattern] = plugin.kernel_names(plugin.Options(**options), "cuda")
    for what, name in SEEN.items():
        if what in found:
            require({name: 1}, [("attention", pattern)])
        else:
            with pytest.raises(Refused, match="none ran"):
                require({name: 1}, [("attention", pattern)])

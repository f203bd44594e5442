"""Which kernels a step launched, and what is made of one that is missing."""

import pytest
import torch

from registry.kernels import bare, require, seen, short
from registry.outcome import Outcome, Refused


def test_operators_that_work_are_seen_and_views_are_not() -> None:
    weight, x = torch.randn(8, 8), torch.randn(2, 8)
    found = seen(lambda: torch.nn.functional.linear(x, weight).view(4, 4).exp(), "cpu")
    assert found["aten::exp"] == 1
    assert {"aten::mm", "aten::linear"} <= set(found)
    assert not {"aten::view", "aten::t", "aten::transpose", "aten::as_strided"} & set(found)


def test_the_most_frequent_comes_first() -> None:
    x = torch.randn(4)
    assert next(iter(seen(lambda: [x.exp() for _ in range(5)] and x.cos(), "cpu"))) == "aten::exp"


@pytest.mark.gpu
def test_on_cuda_the_device_s_own_kernels_are_seen() -> None:
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    found = seen(lambda: x @ x, "cuda")
    assert found
    assert not any(name.startswith("aten::") for name in found)


def test_a_kernel_that_did_not_run_is_a_refusal() -> None:
    kernels = {"void marlin::Marlin<long>": 196, "flash_fwd_splitkv": 28}
    require(kernels, [("quant=gptq-marlin", "[Mm]arlin"), ("attention=fa2", "^flash_fwd")])
    with pytest.raises(Refused) as caught:
        require(kernels, [("quant=gptq-marlin", "[Mm]arlin"), ("quant=awq", "gemm_forward_4bit")])
    assert caught.value.refusal.outcome is Outcome.UNSUPPORTED
    assert caught.value.refusal.reason.startswith(
        "quant=awq asked for a kernel like 'gemm_forward_4bit', and none ran"
    )


def test_where_no_kernel_was_seen_none_is_missed() -> None:
    require({}, [("quant=gptq-marlin", "[Mm]arlin")])


def test_names_are_told_without_their_types_and_elementwise_ones_last() -> None:
    kernels = {
        "void at::native::vectorized_elementwise_kernel<4>(int)": 460,
        "_gemv_kernel": 56,
        "void marlin::Marlin<__nv_bfloat16, 1L>(int4 const*)": 30,
        "void marlin::Marlin<__half, 2L>(int4 const*)": 40,
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<1>(int)": 3,
        "<odd>": 1,
    }
    assert list(short(kernels).items()) == [
        ("marlin::Marlin", 70),
        ("_gemv_kernel", 56),
        ("<odd>", 1),
        ("at::native::vectorized_elementwise_kernel", 460),
        ("at::native::CatArrayBatchedCopy", 3),
    ]
    assert bare("void marlin::Marlin<__half, 2L>(int4 const*)") == "marlin::Marlin"

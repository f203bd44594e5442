"""Which kernels a step launched, and what is made of one that is missing."""

import pytest
import torch

from registry.kernels import apart, bare, require, seen, short
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


def test_variants_of_a_kernel_are_called_by_what_tells_them_apart() -> None:
    """By template arguments; by a number where these are the same for longer than anybody reads."""
    add, mul = (f"void at::native::each<8, at::native::{name}<c10::BFloat16> >(int)" for name in ("Add", "Mul"))
    long = [f"void cub::sum<{'float, ' * 40}{last}>(int)" for last in ("int", "long")]
    told = apart([add, "void gemv<1>(int)", mul, *long])
    assert [told[name] for name in (add, mul)] == [
        "at::native::each<8, Add<BFloat16> >(int)",
        "at::native::each<8, Mul<BFloat16> >(int)",
    ]
    assert told["void gemv<1>(int)"] == "gemv"
    first, second = (told[name] for name in long)
    assert first.startswith("cub::sum<float, float")
    assert first.endswith("...")
    assert second == f"{first} #2"

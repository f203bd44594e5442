import re
from dataclasses import replace

import pytest
from rfloor_example.int8 import MOST_ROWS, Int8Rowwise

from registry.api import NoOptions, Refused
from registry.testing import LinearFormatContract


class TestInt8Rowwise(LinearFormatContract):
    plugin = Int8Rowwise


class Anywhere(Int8Rowwise):
    """The format as it would be if its kernel ran on the CPU, where Triton interprets it."""

    def takes(self, x):
        return x.numel() <= MOST_ROWS * x.shape[-1]


class TestKernel(LinearFormatContract):
    plugin = Anywhere
    shapes = ((64, 16), (96, 21))  # of few programs, which the interpreter runs one after the other


def layer(plugin, in_features, out_features, device, *, bias=True):
    """A converted bf16 layer of random weights, and the format that converted it."""
    import torch

    numbers = torch.Generator().manual_seed(in_features + out_features)
    linear = torch.nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(torch.randn(out_features, in_features, generator=numbers) * 0.02)
    if bias:
        linear.bias.copy_(torch.randn(out_features, generator=numbers))
    maker = plugin(NoOptions())
    return maker, maker.convert(linear.to(device))


def check_product(in_features, out_features, rows, device, *, bias=True, plugin=Int8Rowwise):
    """The layer's product is that of its int8 weight with float32 sums, rounded once."""
    import torch

    with torch.inference_mode():
        maker, module = layer(plugin, in_features, out_features, device, bias=bias)
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(device, torch.bfloat16)
        assert maker.takes(x)
        found = module(x)
        # In float64, so that the order in which a float32 sum is made does not show.
        want = (x.double() @ module.weight.double().T) * module.scale.double().T
        want = want + module.bias.double() if bias else want
    assert found.dtype == torch.bfloat16
    # CUDA rounds to the nearest bf16, the interpreter cuts off; near zero the order of a float32 sum shows.
    rounding = 2**-8 if device == "cuda" else 2**-7
    torch.testing.assert_close(found.double(), want, rtol=rounding, atol=2**-18 * want.abs().max().item())


def here():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_any_number_of_rows(rows):
    check_product(128, 12, rows, here(), plugin=Anywhere)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(1024, 16), (2048, 8), (1000, 16), (1025, 7), (3001, 5), (8, 4), (1, 1)],
)
def test_extents_that_no_tile_divides(in_features, out_features, bias):
    check_product(in_features, out_features, 3, here(), bias=bias, plugin=Anywhere)


def test_rows_that_do_not_lie_together():
    """A slice of a wider tensor, as a body may hand it on."""
    import torch

    with torch.inference_mode():
        _, module = layer(Anywhere, 64, 16, here())
        x = torch.randn(3, 128, device=here(), dtype=torch.bfloat16)[:, ::2]
        assert torch.equal(module(x), module(x.contiguous()))


def test_what_a_layer_gives_is_not_touched_again():
    """A body may write over it, and the layer over nothing that it gave away."""
    import torch

    with torch.inference_mode():
        _, module = layer(Anywhere, 64, 16, here())
        x = torch.randn(2, 64, device=here(), dtype=torch.bfloat16)
        first = module(x)
        kept = first.clone()
        module(-x).fill_(torch.nan)
        assert torch.equal(first, kept)
        assert torch.equal(module(x), kept)


def test_many_rows_are_torch_s():
    import torch

    x = torch.zeros(MOST_ROWS + 1, 64, device=here())
    assert not Anywhere(NoOptions()).takes(x)
    assert not Int8Rowwise(NoOptions()).takes(x)
    assert not Int8Rowwise(NoOptions()).takes(x[:1].cpu())


def test_more_streams_than_the_kernel_takes_are_refused_where_it_runs():
    asked = TestInt8Rowwise().request("cpu", batch_size=MOST_ROWS + 1)
    Int8Rowwise.check(asked)
    Int8Rowwise.check(replace(asked, device="cuda", batch_size=MOST_ROWS))
    with pytest.raises(Refused, match="up to 8 streams, not 9"):
        Int8Rowwise.check(replace(asked, device="cuda"))


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture(autouse=True)
    def cuda(self):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")

    @pytest.mark.parametrize("rows", [1, 2, 4, 8])
    @pytest.mark.parametrize(
        ("in_features", "out_features"), [(896, 128), (3584, 18944), (18944, 3584), (4096, 1024), (3001, 777)]
    )
    def test_shapes_of_real_models(self, in_features, out_features, rows):
        check_product(in_features, out_features, rows, "cuda")

    def test_the_kernel_that_runs_has_the_name_that_is_declared(self):
        import torch
        from torch.profiler import ProfilerActivity, profile

        with torch.inference_mode():
            _, module = layer(Int8Rowwise, 256, 64, "cuda")
            x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
            module(x)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                module(x)
                torch.cuda.synchronize()
        [pattern] = Int8Rowwise.kernel_names(NoOptions(), "cuda")
        assert any(re.search(pattern, event.key) for event in seen.key_averages())

"""The contract of a linear format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest

from registry.api import (
    LinearFormat,
    Plugin,
    Refused,
    tensor_bytes,
)
from registry.testing.contract import Contract, gpu
from registry.testing.tensors import (
    assert_close,
    bytes_beside,
    capture,
    cosine_of,
    given,
    new_tensors,
    no_synchronisation,
    traced,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


class LinearFormatContract(Contract):
    """The contract of `LinearFormat`.

    Class attributes:
        shapes: Layers to convert, `(in_features, out_features)`; those that the format refuses are left out.
        weight_cosine: Least cosine similarity between the stored weight and the original.
        workspace_bytes: Bytes that the format may hold a layer and no product reads.
    """

    kind: ClassVar[type[Plugin]] = LinearFormat
    shapes: ClassVar[Sequence[tuple[int, int]]] = ((64, 64), (128, 96), (256, 320))
    weight_cosine: ClassVar[float] = 0.98
    workspace_bytes: ClassVar[int] = 0

    def layers(self, bias: bool) -> list[_Layer]:
        """A converted layer of every shape that the format takes.

        Raises:
            AssertionError: It takes none.
        """
        device = self.place()
        taken, refusals = [], []
        for in_features, out_features in self.shapes:
            try:
                self.plugin.check(self.request(device, quant=self.name))
                taken.append(self.convert(in_features, out_features, bias, device))
            except Refused as refused:
                refusals.append(f"{in_features} x {out_features}: {refused}")
        assert taken, f"{self.plugin.__name__} refuses every layer: {'; '.join(refusals)}"
        return taken

    def convert(self, in_features: int, out_features: int, bias: bool, device: str) -> _Layer:
        """One seeded layer in the plugin's format, beside what it was made from."""
        import torch

        numbers = torch.Generator().manual_seed(in_features + out_features)
        linear = torch.nn.Linear(in_features, out_features, bias=bias, device=device, dtype=self.torch_dtype())
        linear.requires_grad_(requires_grad=False)
        linear.weight.copy_(torch.randn(out_features, in_features, generator=numbers) * 0.02)
        linear.weight[0] = 0  # pruned checkpoints have such rows: a scale of zero must not become a NaN
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=numbers) * 0.02)
        weight, old_bias = linear.weight.clone(), linear.bias.clone() if bias else None
        maker = self.plugin(self.plugin.Options(**self.options))
        with torch.inference_mode():
            module = maker.convert(linear)
        assert isinstance(module, torch.nn.Module), f"convert returned a {type(module).__name__}, not a module"
        what = f"{in_features} -> {out_features} features, {'with' if bias else 'without'} bias"
        return _Layer(what, maker, module, weight, old_bias)

    def inputs(self, layer: _Layer, *leading: int) -> Tensor:
        """Seeded activations `[*leading, in_features]`."""
        import torch

        numbers = torch.Generator().manual_seed(sum(leading))
        x = torch.randn(*leading, layer.weight.shape[1], generator=numbers)
        return x.to(layer.weight.device, layer.weight.dtype)

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    def test_output_is_the_product_with_its_own_weight(self, bias: bool) -> None:
        """The product equals a float32 one with `dequantize`'s weight, for 1 and 5 tokens, however led."""
        import torch

        for layer in self.layers(bias):
            for leading in ((), (1,), (5,), (1, 1), (3, 1), (2, 5)):
                what = f"{layer.what}, input {[*leading, layer.weight.shape[1]]}"
                x = self.inputs(layer, *leading)
                with torch.inference_mode():
                    out = layer.module(x)
                    want = x.float() @ layer.dequantized().float().T
                want = want if layer.bias is None else want + layer.bias.float()
                assert out.shape == want.shape, f"{what}: the output is {list(out.shape)}, not {list(want.shape)}"
                assert out.dtype == x.dtype, f"{what}: {x.dtype} in, {out.dtype} out"
                what = f"{what}: the output is not the product with the weight that dequantize gives"
                assert_close(out, want, what, self.cosine, self.relative_error)

    def test_bias_is_exact(self) -> None:
        """A zero input gives the bias, bit for bit, and `bias` tells it."""
        import torch

        for layer in self.layers(bias=True):
            with torch.inference_mode():
                out = layer.module(torch.zeros_like(self.inputs(layer, 1)))
            assert torch.equal(out[0], given(layer.bias)), f"{layer.what}: a zero input does not give the bias"
            told = layer.maker.bias(layer.module)
            same = told is not None and torch.equal(told, given(layer.bias))
            assert same, f"{layer.what}: the bias is not what bias() tells"
        for layer in self.layers(bias=False):
            assert layer.maker.bias(layer.module) is None, f"{layer.what}: the module has a bias"

    def test_an_output_is_its_caller_s(self) -> None:
        """Whoever gets it may overwrite it, as `backend=fused` does: the layer keeps no part of it, nor the input."""
        import torch

        for layer in self.layers(bias=True):
            x = self.inputs(layer, 1)
            given_x = x.clone()
            with torch.inference_mode():
                out = layer.module(x)
                kept = out.clone()
                out.fill_(torch.nan)
                again = layer.module(x)
            assert torch.equal(x, given_x), f"{layer.what}: the product changes its input"
            assert torch.equal(again, kept), f"{layer.what}: an output that is overwritten changes the next product"
            assert bool(out.isnan().all()), f"{layer.what}: the next product is written into an earlier output"

    def test_dequantize_gives_the_original_weight(self) -> None:
        """Same shape and dtype, and close to it."""
        import torch

        for layer in self.layers(bias=False):
            with torch.inference_mode():
                weight = layer.dequantized()
            assert weight.shape == layer.weight.shape, f"{layer.what}: dequantize gives {list(weight.shape)}"
            assert weight.dtype == layer.weight.dtype, f"{layer.what}: dequantize gives {weight.dtype}"
            similarity = cosine_of(weight, layer.weight)
            assert similarity >= self.weight_cosine, (
                f"{layer.what}: cosine between dequantize and the original weight is {similarity:.4f}, "
                f"less than {self.weight_cosine}"
            )

    def test_dequantize_changes_nothing(self) -> None:
        """It gives one weight before and after the first product, and the product stays what it was.

        Some kernels repack at the first product; what dequantize then undoes may differ by one rounding.
        """
        import torch

        for layer in self.layers(bias=False):
            x = self.inputs(layer, 1)
            with torch.inference_mode():
                before = layer.dequantized().clone()
                first = layer.module(x).clone()
                after = layer.dequantized()
                second = layer.module(x)
            what = f"{layer.what}: dequantize gives another weight after the first product"
            assert_close(after, before, what, self.cosine, 2 * torch.finfo(before.dtype).eps)
            assert torch.equal(first, second), f"{layer.what}: dequantize changed what the layer computes"

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    def test_stored_is_small_and_counted_once(self, bias: bool) -> None:
        """Each stored tensor has a storage of its own, and together they are no larger than the layer was."""
        for layer in self.layers(bias):
            stored = layer.stored()
            assert stored, f"{layer.what}: stored is empty"
            pointers = {tensor.untyped_storage().data_ptr() for tensor in stored}
            assert len(pointers) == len(stored), f"{layer.what}: stored tells a storage more than once"
            original = tensor_bytes([layer.weight] if layer.bias is None else [layer.weight, layer.bias])
            told = tensor_bytes(stored)
            assert told <= original, f"{layer.what}: stored is {told} bytes, the unquantised layer {original}"

    def test_stored_is_all_that_is_held(self) -> None:
        """No tensor of a layer is missing from `stored`, before and after the first product.

        Every tensor that the conversion or the product leaves alive has to be in it.
        """
        import torch

        for layer in self.layers(bias=True):  # tables that a package makes once for all are no layer's own
            with torch.inference_mode():
                layer.module(self.inputs(layer, 1))
        with new_tensors() as alive:
            layers = self.layers(bias=True)
            for when in ("as converted", "after a product"):
                known = [part for layer in layers for part in (layer.weight, given(layer.bias), *layer.stored())]
                untold = bytes_beside(alive(), known)
                assert untold <= self.workspace_bytes * len(layers), (
                    f"{when}, {len(layers)} layers hold {untold} bytes that are not in stored"
                )
                for layer in layers:
                    with torch.inference_mode():
                        layer.module(self.inputs(layer, 1))

    def test_conversion_is_deterministic(self) -> None:
        """The same layer converts to the same weight and gives the same output."""
        import torch

        for one, two in zip(self.layers(bias=True), self.layers(bias=True), strict=True):
            with torch.inference_mode():
                same_weight = torch.equal(one.dequantized(), two.dequantized())
                same_output = torch.equal(one.module(self.inputs(one, 1)), two.module(self.inputs(two, 1)))
            assert same_weight, f"{one.what}: converting the same layer twice gives two weights"
            assert same_output, f"{one.what}: two conversions of the same layer compute two outputs"

    @gpu
    def test_product_never_waits_for_the_device(self) -> None:
        """No product synchronises with the host."""
        import torch

        self.place_on_gpu()
        for layer in self.layers(bias=True):
            x = self.inputs(layer, 1)
            with torch.inference_mode():
                layer.module(x)
                with no_synchronisation(f"{layer.what}: the product"):
                    layer.module(x)

    @gpu
    def test_product_can_be_captured(self) -> None:
        """A captured product, replayed on another input, is the product with that input."""
        import torch

        self.place_on_gpu()
        if "cuda_graph" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare cuda_graph")
        try:
            self.plugin.check(self.request(self.place(), quant=self.name, execution="cuda_graph", cache="static"))
        except Refused as refused:
            pytest.skip(f"refused: {refused}")
        for layer in self.layers(bias=True):
            x = torch.zeros_like(self.inputs(layer, 1))
            with torch.inference_mode():
                graph, out = capture(lambda layer=layer, x=x: layer.module(x))  # type: ignore[misc]
                x.copy_(self.inputs(layer, 1))
                graph.replay()
                want = layer.module(x)
                what = f"{layer.what}: the replayed product differs from the eager one"
                assert_close(out, want, what, self.cosine, self.relative_error)

    def test_product_can_be_compiled(self) -> None:
        """A product that torch.compile has traced, be it in parts, is the eager one, with the next input too."""
        import torch

        if "compile" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare compile")
        try:
            self.plugin.check(self.request(self.place(), quant=self.name, execution="compile", cache="static"))
        except Refused as refused:
            pytest.skip(f"refused: {refused}")
        for layer in self.layers(bias=True):
            with torch.inference_mode(), traced(layer.module) as product:
                for factor in (1, 2):
                    x = self.inputs(layer, 1) * factor
                    what = f"{layer.what}: the compiled product differs from the eager one"
                    assert_close(product(x), layer.module(x), what, self.cosine, self.relative_error)


@dataclass(frozen=True)
class _Layer:
    """A converted layer.

    Attributes:
        what: Its shape, for messages.
        maker: The format that converted it.
        module: The result.
        weight: A copy of the original weight, `[out_features, in_features]`.
        bias: A copy of the original bias, `[out_features]`.
    """

    what: str
    maker: LinearFormat
    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    def dequantized(self) -> Tensor:
        return self.maker.dequantize(self.module)

    def stored(self) -> list[Tensor]:
        return self.maker.stored(self.module)

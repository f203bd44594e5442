"""The contract suites that every plugin inherits: subclass one, name the plugin, and that is the test.

    from registry.testing import LinearFormatContract

    class TestInt3(LinearFormatContract):
        plugin = Int3

The suites need pytest and whatever the plugin needs, no accelerator: what can only be seen on a GPU is
marked `gpu` and skipped without one. What a plugin refuses is skipped too, but a plugin that refuses
everything fails. Every number that a test judges by is a class attribute, so a subclass can set it, and
has to say why.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as Specifier

from registry.api import (
    Architecture,
    AttentionKernel,
    AttentionShape,
    Backend,
    LinearFormat,
    Plugin,
    Refused,
    Request,
    Requirement,
    Setup,
    tensor_bytes,
)
from registry.plugins import Catalog
from registry.validate import CACHES, EXECUTIONS
from registry.weights import RandomWeights, expected_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

__all__ = ["TINY", "AttentionKernelContract", "BackendContract", "LinearFormatContract"]

TINY = Architecture(
    name="tiny",
    model_type="qwen2",
    layers=3,
    hidden=128,
    q_heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=256,
    vocab=1024,
    max_context=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    tied_embeddings=False,
)
"""Small enough for a CPU, with every part of the real ones: grouped heads, biases, a head of its own."""

DEVICES = ("cpu", "cuda")

Test = TypeVar("Test", bound="Callable[..., None]")


def _gpu(test: Test) -> Test:
    """Mark a test `gpu`, so that `-m "not gpu"` leaves it out; it skips itself without CUDA anyway.

    A project that has not registered the marker gets the test without it: under `--strict-markers` an
    unknown marker would keep the whole module from being collected.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        try:
            marked: Test = pytest.mark.gpu(test)
        except pytest.fail.Exception:
            return test
    return marked


class _Contract:
    """What the suites share: how a plugin is configured, where it runs, and what every plugin declares.

    Class attributes:
        plugin: The class under test.
        options: Values of its `Options` that differ from their defaults.
        name: The name it is announced under, which the other plugins' `check` may ask about.
        device: `cpu` or `cuda`; `None` takes CUDA where there is some and the plugin runs there.
        dtype: Name of the torch dtype of activations and cache.
        architecture: The model.
        cosine: Least cosine similarity between what the plugin computes and what a reference does.
        relative_error: Largest difference to a reference of the same weights, over the reference's largest
            element. Rounding to bf16 alone costs 0.004.
    """

    kind: ClassVar[type[Plugin]]
    plugin: ClassVar[Any]
    options: ClassVar[Mapping[str, Any]] = {}
    name: ClassVar[str] = "plugin-under-test"
    device: ClassVar[str | None] = None
    dtype: ClassVar[str] = "bfloat16"
    architecture: ClassVar[Architecture] = TINY
    cosine: ClassVar[float] = 0.999
    relative_error: ClassVar[float] = 0.02

    def place(self) -> str:
        """The device to test on; skips the test where the plugin cannot run at all."""
        import torch

        _skip_without(self.plugin)
        if self.device is not None:
            device = self.device
        else:
            device = "cuda" if torch.cuda.is_available() and "cuda" in self.plugin.devices else "cpu"
        if device not in self.plugin.devices or (device == "cuda" and not torch.cuda.is_available()):
            pytest.skip(f"{self.plugin.__name__} runs on {', '.join(self.plugin.devices)}, not here")
        least = self.plugin.min_capability
        if device == "cuda" and least is not None and torch.cuda.get_device_capability() < least:
            pytest.skip(f"{self.plugin.__name__} needs compute capability {least}")
        return device

    def place_on_gpu(self) -> str:
        """`cuda`; skips the test where the plugin does not run there."""
        device = self.place()
        if device != "cuda":
            pytest.skip("needs a CUDA device")
        return device

    def torch_dtype(self) -> Any:
        """`dtype` as torch has it."""
        import torch

        return getattr(torch, self.dtype)

    def request(self, device: str, **changes: Any) -> Request:
        """What `check` is asked: this plugin at batch 1, eager, beside rfloor's defaults."""
        import torch

        asked = Request(
            architecture=self.architecture,
            backend="hf",
            quant="none",
            attention="sdpa",
            execution="eager",
            cache="dynamic",
            batch_size=1,
            capacity=64,
            device=device,
            capability=torch.cuda.get_device_capability() if device == "cuda" else None,
            options=self.plugin.Options(**self.options),
        )
        return replace(asked, **changes)

    def test_class_is_a_complete_plugin(self) -> None:
        """A concrete subclass of its kind; what is abstract in `registry.api` is there."""
        assert issubclass(self.plugin, self.kind), f"{self.plugin.__name__} is no {self.kind.__name__}"
        missing = sorted(getattr(self.plugin, "__abstractmethods__", ()))
        assert not inspect.isabstract(self.plugin), f"{self.plugin.__name__} lacks {', '.join(missing)}"

    def test_requirements_can_be_read(self) -> None:
        """Each is a `Requirement` whose package pip could parse, with a command that brings it."""
        for requirement in self.plugin.requires:
            assert isinstance(requirement, Requirement), f"requires holds {requirement!r}, which is no Requirement"
            try:
                Specifier(requirement.package)
            except InvalidRequirement as error:
                raise AssertionError(f"requires: {requirement.package!r} is no package: {error}") from error
            assert requirement.install.strip(), f"{requirement.package} comes without the command that installs it"

    def test_declarations_are_known_and_consistent(self) -> None:
        """Devices, caches and executions are the known ones, and a graph has what it takes to be captured."""
        plugin = self.plugin
        for declared, known in (("devices", DEVICES), ("caches", CACHES), ("executions", EXECUTIONS)):
            values = getattr(plugin, declared)
            assert isinstance(values, tuple), f"{declared} is {values!r}; it has to be a tuple of names"
            assert values, f"{declared} is empty, so no cell can ever use the plugin"
            assert set(values) <= set(known), f"{declared} is {values}; known: {', '.join(known)}"
        assert "eager" in plugin.executions, "executions lacks eager, the mode in which a step is checked first"
        if "cuda_graph" in plugin.executions:
            assert "static" in plugin.caches, "cuda_graph is declared, but a graph needs a static cache"
            assert "cuda" in plugin.devices, "cuda_graph is declared, but CUDA is not among the devices"

    def test_min_capability_is_a_version(self) -> None:
        """`None`, or major and minor of a CUDA compute capability."""
        least = self.plugin.min_capability
        if least is not None:
            assert isinstance(least, tuple), f"min_capability is {least!r}; (8, 0) is the form"
            assert [type(part) for part in least] == [int, int], f"min_capability is {least!r}; (8, 0) is the form"
            assert "cuda" in self.plugin.devices, "min_capability is given, but CUDA is not among the devices"

    def test_options_have_defaults(self) -> None:
        """`Options` is a dataclass with nothing to fill in: a plugin is selectable by its name alone."""
        options = self.plugin.Options
        assert isinstance(options, type), f"Options is {options!r}, which is no class"
        assert dataclasses.is_dataclass(options), f"Options is {options!r}, which is no dataclass"
        unset = [
            field.name
            for field in dataclasses.fields(options)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        assert not unset, f"options without a default: {', '.join(unset)}"

    def test_import_is_light(self) -> None:
        """Importing the module brings neither torch nor the packages that the plugin requires.

        The declarations are read before a missing package can be told, in a process that never needs torch.
        """
        heavy = ["torch", "transformers", *_modules_of(self.plugin.requires)]
        probe = (
            "import importlib, sys\n"
            "importlib.import_module(sys.argv[1])\n"
            "print(*[name for name in sys.argv[2:] if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", probe, self.plugin.__module__, *heavy],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{self.plugin.__module__} cannot be imported by itself:\n{done.stderr}"
        brought = done.stdout.split()
        assert not brought, f"importing {self.plugin.__module__} imports {', '.join(brought)} as well"


class LinearFormatContract(_Contract):
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
                _assert_close(out, want, what, self.cosine, self.relative_error)

    def test_bias_is_exact(self) -> None:
        """A zero input gives the bias, bit for bit, and bodies find it as the module's `bias`."""
        import torch

        for layer in self.layers(bias=True):
            with torch.inference_mode():
                out = layer.module(torch.zeros_like(self.inputs(layer, 1)))
            assert torch.equal(out[0], _given(layer.bias)), f"{layer.what}: a zero input does not give the bias"
            told = getattr(layer.module, "bias", None)
            same = told is not None and torch.equal(told, _given(layer.bias))
            assert same, f"{layer.what}: the bias is not the module's attribute bias"
        for layer in self.layers(bias=False):
            assert getattr(layer.module, "bias", None) is None, f"{layer.what}: the module has a bias"

    def test_dequantize_gives_the_original_weight(self) -> None:
        """Same shape and dtype, and close to it."""
        import torch

        for layer in self.layers(bias=False):
            with torch.inference_mode():
                weight = layer.dequantized()
            assert weight.shape == layer.weight.shape, f"{layer.what}: dequantize gives {list(weight.shape)}"
            assert weight.dtype == layer.weight.dtype, f"{layer.what}: dequantize gives {weight.dtype}"
            similarity = _cosine(weight, layer.weight)
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
            _assert_close(after, before, what, self.cosine, 2 * torch.finfo(before.dtype).eps)
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
        with _new_tensors() as alive:
            layers = self.layers(bias=True)
            for when in ("as converted", "after a product"):
                known = [part for layer in layers for part in (layer.weight, _given(layer.bias), *layer.stored())]
                untold = _bytes_beside(alive(), known)
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

    @_gpu
    def test_product_never_waits_for_the_device(self) -> None:
        """No product synchronises with the host."""
        import torch

        self.place_on_gpu()
        for layer in self.layers(bias=True):
            x = self.inputs(layer, 1)
            with torch.inference_mode():
                layer.module(x)
                with _no_synchronisation(f"{layer.what}: the product"):
                    layer.module(x)

    @_gpu
    def test_product_can_be_captured(self) -> None:
        """A captured product, replayed on another input, is the product with that input."""
        import torch

        self.place_on_gpu()
        if "cuda_graph" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare cuda_graph")
        for layer in self.layers(bias=True):
            x = torch.zeros_like(self.inputs(layer, 1))
            with torch.inference_mode():
                graph, out = _capture(lambda layer=layer, x=x: layer.module(x))  # type: ignore[misc]
                x.copy_(self.inputs(layer, 1))
                graph.replay()
                want = layer.module(x)
                what = f"{layer.what}: the replayed product differs from the eager one"
                _assert_close(out, want, what, self.cosine, self.relative_error)


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


class AttentionKernelContract(_Contract):
    """The contract of `AttentionKernel`: what a float32 softmax over the valid rows gives.

    Class attributes:
        kv_heads: Key/value heads.
        groups: Query heads a key/value head.
        head_dims: Widths of a head.
        capacity: Rows of the cache; odd, because a context plus some steps is what it is.
        lengths: Valid rows to attend to; a step has two at least, a prompt's token and its own.
    """

    kind: ClassVar[type[Plugin]] = AttentionKernel
    kv_heads: ClassVar[int] = 2
    groups: ClassVar[Sequence[int]] = (1, 2, 4, 7, 8)
    head_dims: ClassVar[Sequence[int]] = (32, 64, 128)
    capacity: ClassVar[int] = 161
    lengths: ClassVar[Sequence[int]] = (2, 3, 17, 33, 129, 161)

    def kernels(self, cache: str, batch_size: int, execution: str = "eager") -> Iterator[_Planned]:
        """A planned kernel for every shape that the plugin takes."""
        device = self.place()
        for group, head_dim in itertools.product(self.groups, self.head_dims):
            planned = self.plan(group, head_dim, cache, batch_size, execution, device)
            if planned is not None:
                yield planned

    def plan(
        self, group: int, head_dim: int, cache: str, batch_size: int, execution: str, device: str
    ) -> _Planned | None:
        """The kernel planned for one shape, with its tensors; `None` if it refuses."""
        q_heads = group * self.kv_heads
        architecture = replace(
            self.architecture,
            q_heads=q_heads,
            kv_heads=self.kv_heads,
            head_dim=head_dim,
            hidden=q_heads * head_dim,
        )
        asked = self.request(
            device,
            architecture=architecture,
            attention=self.name,
            cache=cache,
            batch_size=batch_size,
            capacity=self.capacity,
            execution=execution,
        )
        shape = AttentionShape(
            batch_size, q_heads, self.kv_heads, head_dim, self.capacity, self.torch_dtype(), device
        )
        if cache not in self.plugin.caches:
            return None
        kernel = self.plugin(asked.options)
        try:
            self.plugin.check(asked)
            kernel.plan(shape)
        except Refused:
            return None
        return _Planned(kernel, shape, cache, seed=group * 1000 + head_dim)

    def test_some_shape_is_served(self) -> None:
        """Not everything is refused, so that the other tests have something to say."""
        served = [planned for cache in CACHES for planned in self.kernels(cache, batch_size=1)]
        assert served, f"{self.plugin.__name__} refuses every shape and cache that the suite has"

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_is_attention(self, cache: str, batch_size: int) -> None:
        """The output is attention over the valid rows and over nothing else.

        One plan serves every length. In a static cache the rows behind the valid ones hold large numbers:
        a kernel that reads them is far off. The scale is not the usual one, so that it is used, not guessed.
        """
        import torch

        served = False
        for planned in self.kernels(cache, batch_size):
            for length in self.lengths:
                served = True
                call = planned.call(length)
                with torch.inference_mode():
                    out = call.decode()
                what = f"{planned}, {length} valid rows"
                assert out.shape == call.q.shape, f"{what}: the output is {list(out.shape)}"
                assert out.dtype == call.q.dtype, f"{what}: {call.q.dtype} in, {out.dtype} out"
                what = f"{what}: the output is not the attention over the valid rows"
                _assert_close(out, call.reference(), what, self.cosine, self.relative_error)
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache")

    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_leaves_everything_as_it_was(self, cache: str) -> None:
        """Inputs stay untouched, and a call does not depend on the calls before it: layers share a kernel."""
        import torch

        served = False
        for planned in self.kernels(cache, batch_size=1):
            served = True
            short, long = planned.call(self.lengths[1]), planned.call(self.lengths[-1])
            inputs = [tensor.clone() for tensor in (long.q, long.k, long.v)]
            with torch.inference_mode():
                first = long.decode().clone()
                short.decode()
                again = long.decode()
            for name, old, new in zip("qkv", inputs, (long.q, long.k, long.v), strict=True):
                assert torch.equal(old, new), f"{planned}: decode changes its {name}"
            what = f"{planned}: the same call gives something else after another one"
            _assert_close(again, first, what, self.cosine, 2 * torch.finfo(first.dtype).eps)
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache")

    @_gpu
    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_never_waits_for_the_device(self, cache: str) -> None:
        """No call synchronises with the host."""
        import torch

        self.place_on_gpu()
        served = False
        for planned in self.kernels(cache, batch_size=1):
            served = True
            call = planned.call(self.lengths[2])
            with torch.inference_mode():
                call.decode()
                with _no_synchronisation(f"{planned}: decode"):
                    call.decode()
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache")

    @_gpu
    def test_decode_can_be_captured(self) -> None:
        """A captured call reads the length from the device: one graph serves every length."""
        import torch

        self.place_on_gpu()
        if "cuda_graph" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare cuda_graph")
        served = False
        for planned in self.kernels("static", batch_size=1, execution="cuda_graph"):
            served = True
            call = planned.call(self.lengths[-1])
            with torch.inference_mode():
                graph, out = _capture(call.decode)
                for length in self.lengths:
                    call.become(planned.call(length))
                    graph.replay()
                    what = f"{planned}: the replayed graph, given {length} valid rows, does not attend to those"
                    _assert_close(out, call.reference(), what, self.cosine, self.relative_error)
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the static cache")


@dataclass(frozen=True)
class _Planned:
    """A kernel and the shape that it was planned for."""

    kernel: AttentionKernel
    shape: AttentionShape
    cache: str
    seed: int

    def __str__(self) -> str:
        s = self.shape
        return f"{s.q_heads}/{s.kv_heads} heads of {s.head_dim}, batch {s.batch_size}, {self.cache} cache"

    def call(self, length: int) -> _Call:
        """Seeded arguments with `length` valid rows.

        A static cache has all its rows, the invalid ones full of numbers a thousand times too large.
        """
        import torch

        s = self.shape
        rows = s.capacity if self.cache == "static" else length
        numbers = torch.Generator().manual_seed(self.seed + length)
        q = torch.randn(s.batch_size, s.q_heads, s.head_dim, generator=numbers)
        k, v = torch.randn(2, s.batch_size, s.kv_heads, rows, s.head_dim, generator=numbers)
        k[:, :, length:] *= 1000
        v[:, :, length:] *= 1000
        q, k, v = (tensor.to(s.device, s.dtype) for tensor in (q, k, v))
        if self.cache == "dynamic":
            return _Call(self.kernel, q, k, v, None, None, length)
        mask = (torch.arange(rows, device=s.device) < length).expand(s.batch_size, 1, 1, rows).contiguous()
        kv_len = torch.tensor(length, device=s.device)
        return _Call(self.kernel, q, k, v, kv_len, mask if self.kernel.needs_mask else None, length)


@dataclass
class _Call:
    """The arguments of one `decode`."""

    kernel: AttentionKernel
    q: Tensor
    k: Tensor
    v: Tensor
    kv_len: Tensor | None
    mask: Tensor | None
    length: int

    @property
    def scale(self) -> float:
        """Half of the usual factor."""
        return float(0.5 / math.sqrt(self.q.shape[-1]))

    def decode(self) -> Tensor:
        return self.kernel.decode(self.q, self.k, self.v, kv_len=self.kv_len, scale=self.scale, mask=self.mask)

    def become(self, other: _Call) -> None:
        """Take over the other call's values in this one's tensors, as a replayed graph needs it."""
        for mine, theirs in zip(
            (self.q, self.k, self.v, self.kv_len, self.mask),
            (other.q, other.k, other.v, other.kv_len, other.mask),
            strict=True,
        ):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        self.length = other.length

    def reference(self) -> Tensor:
        """Softmax attention over the valid rows in float32, `[batch, q_heads, head_dim]`."""
        q, k, v = self.q.float(), self.k[:, :, : self.length].float(), self.v[:, :, : self.length].float()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = (k @ q[..., None]).squeeze(-1).mul(self.scale).softmax(-1)
        return (weights[..., None, :] @ v).squeeze(-2)


class BackendContract(_Contract):
    """The contract of `Backend`: a whole decode step against a plain transformers model.

    Class attributes:
        formats: Names of linear formats to host; those that the plugin's own `formats` leaves out are not
            tried. `none` has to be among them if the plugin hosts it.
        attention: Name of the attention kernel to host.
        prompt_tokens: Length of the prompt.
        steps: Decode steps; together they fill the cache to its last row.
        margin_ulps: Greedy tokens have to agree where the reference's best two logits are further apart than
            this many units in the last place of the larger. A logit ends a chain of roundings to `dtype`
            whose errors go with the scale of the whole sum, not with the logit itself, so the largest logit
            sets the noise. One logit's error was seen to have a standard deviation of about one such unit,
            the difference of two 1.4, so 6 is four of those.
        repeat_tolerance: Largest difference, over the largest logit, between two runs of the same steps. 0 is
            bit for bit; a kernel whose sums come in no fixed order needs more.
        buffer_bytes: Bytes that the backend may hold besides weights and cache (frequencies, counters,
            workspaces).
        kv_element_bytes: Bytes of a cached number; `None` is that of `dtype`.
    """

    kind: ClassVar[type[Plugin]] = Backend
    formats: ClassVar[Sequence[str]] = ("none", "nf4")
    attention: ClassVar[str] = "sdpa"
    prompt_tokens: ClassVar[int] = 12
    steps: ClassVar[int] = 8
    margin_ulps: ClassVar[float] = 6.0
    repeat_tolerance: ClassVar[float] = 0.0
    buffer_bytes: ClassVar[int] = 2048
    kv_element_bytes: ClassVar[int | None] = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that asks for a cache, a format or a batch size once for each that is served."""
        axes = {"cache": self.plugin.caches, "quant": self.hosted(), "batch_size": (1, 3)}
        for name, values in axes.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    def hosted(self) -> list[str]:
        """The formats to try."""
        hosts = self.plugin.formats
        return [name for name in self.formats if hosts is None or name in hosts]

    def linear(self, quant: str) -> LinearFormat:
        """The linear format of this name, as it comes; skips the test if its package is missing."""
        plugin = Catalog().load("quant", quant)
        _skip_without(plugin)
        made: LinearFormat = plugin(plugin.Options())
        return made

    def kernel(self) -> AttentionKernel:
        """The attention kernel, as it comes; skips the test if its package is missing."""
        plugin = Catalog().load("attention", self.attention)
        _skip_without(plugin)
        made: AttentionKernel = plugin(plugin.Options())
        return made

    @property
    def capacity(self) -> int:
        """Rows of the cache: the prompt's and the steps', and none to spare."""
        return self.prompt_tokens + self.steps

    def setup(self, cache: str, quant: str, batch_size: int = 1, seed: int = 0) -> Setup:
        """What the backend is made with. Override it for a backend that needs weights of its own kind."""
        return Setup(
            architecture=self.architecture,
            weights=RandomWeights(seed),
            device=self.place(),
            dtype=self.torch_dtype(),
            batch_size=batch_size,
            cache=cache,
            linear=self.linear(quant),
            attention=self.kernel(),
            options=self.plugin.Options(**self.options),
        )

    def unread_embedding_bytes(self) -> int:
        """Bytes of the embedding of which a step reads a row a stream; 0 if it is the head, read in full."""
        a = self.architecture
        return 0 if a.tied_embeddings else a.vocab * a.hidden * self.torch_dtype().itemsize

    def checked(self, cache: str, quant: str, batch_size: int = 1, seed: int = 0, execution: str = "eager") -> Setup:
        """A setup that none of the three plugins refuses beforehand.

        Raises:
            Refused: One of them does.
        """
        setup = self.setup(cache, quant, batch_size, seed)
        asked = self.request(
            setup.device,
            backend=self.name,
            quant=quant,
            attention=self.attention,
            cache=cache,
            batch_size=batch_size,
            capacity=self.capacity,
            execution=execution,
        )
        for plugin in (setup.linear, setup.attention):
            type(plugin).check(replace(asked, options=plugin.options))
        self.plugin.check(asked)
        return setup

    @contextmanager
    def serving(
        self, cache: str, quant: str, batch_size: int = 1, seed: int = 0, execution: str = "eager"
    ) -> Iterator[Any]:
        """A loaded backend, closed at the end; skips the test if the combination is refused."""
        import torch

        with torch.inference_mode():
            try:
                backend = self.plugin(self.checked(cache, quant, batch_size, seed, execution))
                backend.load(self.capacity)
            except Refused as refused:
                pytest.skip(f"refused: {refused}")
            try:
                yield backend
            finally:
                backend.close()

    def prompt(self, batch_size: int) -> Tensor:
        """Seeded tokens, `[batch, prompt_tokens]`, other ones for each stream."""
        import torch

        numbers = torch.Generator().manual_seed(1)
        size = (batch_size, self.prompt_tokens)
        return torch.randint(self.architecture.vocab, size, generator=numbers).to(self.place())

    def decode(self, backend: Any, batch_size: int, steps: int) -> tuple[Tensor, Tensor]:
        """Prefill and decode greedily.

        Returns:
            The tokens fed, prompt first, `[batch, prompt_tokens + steps]`, and the logits after each position
            from the prompt's last on, `[batch, steps + 1, vocab]`.
        """
        import torch

        tokens = self.prompt(batch_size)
        logits = [backend.prefill(tokens).clone()]
        for _ in range(steps):
            token = logits[-1].argmax(-1)
            tokens = torch.cat([tokens, token[:, None]], 1)
            logits.append(backend.decode_step(token).clone())
        return tokens, torch.stack(logits, 1)

    def feed(self, backend: Any, tokens: Tensor) -> Tensor:
        """Decode given tokens `[batch, steps]` one by one; logits `[batch, steps, vocab]`."""
        import torch

        return torch.stack([backend.decode_step(token.contiguous()).clone() for token in tokens.unbind(1)], 1)

    def reference(self, backend: Any, tokens: Tensor) -> Tensor:
        """The logits of a plain transformers model in float32 that holds the backend's own weights.

        Float32, so that only one side of the comparison rounds.

        Args:
            backend: Loaded; asked for its dequantised weights.
            tokens: `[batch, tokens]`.

        Returns:
            `[batch, tokens, vocab]`.
        """
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(
            self.architecture.transformers_config(), dtype=torch.float32, attn_implementation="eager"
        )
        model = model.to(tokens.device).eval()
        model.load_state_dict({name: tensor.float() for name, tensor in backend.dequantized()}, strict=False)
        logits: Tensor = model(tokens).logits
        return logits

    def assert_repeated(self, got: Tensor, want: Tensor, what: str) -> None:
        """Fail unless two runs gave the same logits."""
        assert got.shape == want.shape, f"{what}: {list(got.shape)} against {list(want.shape)}"
        difference = float((got.float() - want.float()).abs().max() / want.float().abs().max())
        assert difference <= self.repeat_tolerance, f"{what}: logits differ by {difference:.2g} of the largest"

    def test_hosts_are_names(self) -> None:
        """`formats` and `attentions` are `None` or tuples of names."""
        for declared in ("formats", "attentions"):
            names = getattr(self.plugin, declared)
            proper = names is None or (isinstance(names, tuple) and all(isinstance(name, str) for name in names))
            assert proper, f"{declared} is {names!r}; it has to be None or a tuple of names"

    def test_some_combination_is_served(self) -> None:
        """Not every cache and format is refused, so that the other tests have something to say."""
        import torch

        refusals = []
        for cache, quant in itertools.product(self.plugin.caches, self.hosted()):
            try:
                with torch.inference_mode():
                    backend = self.plugin(self.checked(cache, quant))
                    backend.load(self.capacity)
            except Refused as refused:
                refusals.append(f"{cache} cache, {quant}: {refused}")
            else:
                backend.close()
                return
        raise AssertionError(f"{self.plugin.__name__} refuses every combination: {'; '.join(refusals)}")

    def test_dequantized_are_the_models_weights(self, cache: str, quant: str) -> None:
        """Each tensor of the model by its name, in shape and dtype; unquantised ones bit for bit."""
        import torch

        wanted = expected_tensors(self.architecture)
        optional = {"lm_head.weight"} if self.architecture.tied_embeddings else set()
        with self.serving(cache, quant) as backend:
            found = dict(backend.dequantized())
            missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys() - optional
            assert not missing, f"dequantized lacks {', '.join(sorted(missing))}"
            assert not unknown, f"dequantized gives {', '.join(sorted(unknown))}, which the model does not have"
            source = backend.setup.weights
            for name, shape in wanted.items():
                tensor = found[name]
                assert tuple(tensor.shape) == shape, f"dequantized: {name} is {list(tensor.shape)}, not {shape}"
                assert tensor.dtype == self.torch_dtype(), f"dequantized: {name} is {tensor.dtype}"
                given = source.tensor(name, shape, tensor.dtype, backend.setup.device)
                if quant == "none":
                    assert torch.equal(tensor, given), f"{name} is not the tensor that the weight source gives"
                similarity = _cosine(tensor, given)
                assert similarity > 0.9, f"{name} has cosine {similarity:.3f} with what the weight source gives"

    def test_linear_layers_are_the_formats(self, cache: str, quant: str) -> None:
        """What the format converts is what the backend holds: `weights` has every stored tensor."""
        if self.plugin.formats is not None:
            pytest.skip(f"{self.plugin.__name__} hosts formats of its own kind only")
        plugin = type(self.linear(quant))
        unwatched, made = plugin.convert, []

        def convert(self: LinearFormat, linear: nn.Linear) -> nn.Module:
            made.append(unwatched(self, linear))
            return made[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugin, "convert", convert)
            with self.serving(cache, quant) as backend:
                linear = backend.setup.linear
                held = _storages(backend.weights().values())
                stored = _storages(tensor for module in made for tensor in linear.stored(module))
        assert made, f"{self.plugin.__name__} never asked the format {quant} to convert a layer"
        assert stored.keys() <= held.keys(), "weights() lacks tensors that the format stores for its layers"

    def test_steps_equal_a_full_forward(self, cache: str, quant: str, batch_size: int) -> None:
        """Prefill and steps give the logits of one forward of a plain model with the same weights.

        Held to the last row of the cache.
        """
        with self.serving(cache, quant, batch_size) as backend:
            tokens, logits = self.decode(backend, batch_size, self.steps)
            want = self.reference(backend, tokens)[:, self.prompt_tokens - 1 :]
            assert logits.shape == want.shape, f"logits are {list(logits.shape)}, not {list(want.shape)}"
            for stream, index in itertools.product(range(batch_size), range(self.steps + 1)):
                what = "prefill" if index == 0 else f"step {index}"
                similarity = _cosine(logits[stream, index], want[stream, index])
                assert similarity >= self.cosine, (
                    f"{what}, stream {stream}: cosine with the reference's logits is {similarity:.5f}, "
                    f"less than {self.cosine}"
                )
            best = want.topk(2, -1).values
            noise = self.margin_ulps * _ulp(best[..., 0], self.torch_dtype())
            decisive = best[..., 0] - best[..., 1] > noise
            assert decisive.any(), "the reference's best two logits are everywhere within the noise: more steps"
            agree = logits.argmax(-1) == want.argmax(-1)
            wrong = (decisive & ~agree).nonzero().tolist()
            assert not wrong, f"greedy tokens differ from the reference's at (stream, step) {wrong}"

    def test_cache_grows_by_one_a_step(self, cache: str, batch_size: int) -> None:
        """`position` counts the prompt, then one a step, whatever the number of streams."""
        with self.serving(cache, self.hosted()[0], batch_size) as backend:
            token = backend.prefill(self.prompt(batch_size)).argmax(-1)
            for step in range(self.steps + 1):
                position, expected = backend.position(), self.prompt_tokens + step
                assert position == expected, f"position() is {position} after {step} steps, not {expected}"
                if step < self.steps:
                    token = backend.decode_step(token).argmax(-1)

    def test_seek_brings_back_the_logits(self, cache: str, quant: str, batch_size: int) -> None:
        """After `seek` the same tokens give the same logits: earlier rows stay, later ones are forgotten."""
        with self.serving(cache, quant, batch_size) as backend:
            tokens, logits = self.decode(backend, batch_size, self.steps)
            for start in (0, 2):
                position = self.prompt_tokens + start
                backend.seek(position)
                found = backend.position()
                assert found == position, f"position() is {found} after seek({position})"
                self.feed(backend, (tokens[:, position:] + 1) % self.architecture.vocab)
                backend.seek(position)
                again = self.feed(backend, tokens[:, position:])
                what = f"after seek({position}) the same tokens do not give the same logits"
                self.assert_repeated(again, logits[:, start + 1 :], what)

    def test_seek_to_the_start_empties_the_cache(self, cache: str) -> None:
        """After `seek(0)` a prefill is as good as the first."""
        with self.serving(cache, self.hosted()[0]) as backend:
            _, logits = self.decode(backend, 1, steps=3)
            backend.seek(0)
            assert backend.position() == 0, f"position() is {backend.position()} after seek(0)"
            _, again = self.decode(backend, 1, steps=3)
            self.assert_repeated(again, logits, "a prefill after seek(0) differs from the first")

    def test_seed_determines_the_logits(self, cache: str, quant: str) -> None:
        """Two backends of one seed agree; one of another seed does not."""
        import torch

        runs = []
        for seed in (0, 0, 1):
            with self.serving(cache, quant, seed=seed) as backend:
                prefill = backend.prefill(self.prompt(1)).clone()
                step = backend.decode_step(self.prompt(1)[:, 0]).clone()
                runs.append(torch.stack([prefill, step], 1))
        self.assert_repeated(runs[1], runs[0], "two backends with weights of one seed do not agree")
        assert not torch.equal(runs[0], runs[2]), "another seed's weights give the very same logits"

    def test_weight_bytes_are_the_tensors_held(self, cache: str, quant: str, batch_size: int) -> None:
        """`bytes_per_step().weights` is every held storage once, an unread embedding as one row a stream."""
        with self.serving(cache, quant, batch_size) as backend:
            self.decode(backend, batch_size, steps=1)
            unread = self.unread_embedding_bytes()
            rows = batch_size * unread // self.architecture.vocab
            expected = sum(_storages(backend.weights().values()).values()) - unread + rows
            told = backend.bytes_per_step(16).weights
            assert told == expected, f"bytes_per_step tells {told} weight bytes, the tensors held are {expected}"

    def test_kv_bytes_follow_the_context(self, cache: str, batch_size: int) -> None:
        """2 x layers x KV heads x head_dim x context x bytes of an element x streams, fractions included."""
        a = self.architecture
        element = self.kv_element_bytes or self.torch_dtype().itemsize
        with self.serving(cache, self.hosted()[0], batch_size) as backend:
            backend.prefill(self.prompt(batch_size))
            for context in (1, 16, 20.5):
                expected = 2 * a.layers * a.kv_heads * a.head_dim * context * element * batch_size
                told = backend.bytes_per_step(context).kv
                assert told == expected, f"bytes_per_step({context}) tells {told} KV bytes, not {expected}"

    def test_nothing_large_is_held_beside_weights_and_cache(self, cache: str, quant: str) -> None:
        """No tensor that a step might read goes uncounted.

        The garbage collector's tensors that were not there before the load, less `weights()`, fit into the
        cache and `buffer_bytes`. (A tensor that only C++ holds escapes this; on a GPU the allocator tells.)
        """
        with self.serving(cache, quant) as first:  # what packages make once for all is there from here on
            self.decode(first, 1, steps=2)
        with _new_tensors() as alive, self.serving(cache, quant) as backend:
            self.decode(backend, 1, steps=2)
            beside = _bytes_beside(alive(), backend.weights().values())
            allowed = self.cache_bytes(backend) + self.buffer_bytes
            assert beside <= allowed, (
                f"{beside} bytes are held beside weights(), the cache takes {self.cache_bytes(backend)} "
                f"and buffers may take {self.buffer_bytes}"
            )

    def cache_bytes(self, backend: Any) -> int:
        """Bytes that the cache of one stream takes now."""
        rows = self.capacity if backend.setup.cache == "static" else backend.position()
        element = self.kv_element_bytes or self.torch_dtype().itemsize
        return rows * self.architecture.kv_bytes_per_token(element)

    def test_close_releases_the_memory(self, cache: str, quant: str) -> None:
        """After `close`, weights, cache and workspaces are gone, even while the closed backend is not."""
        import torch

        with self.serving(cache, quant) as first:
            self.decode(first, 1, steps=2)
        del first
        allocated = torch.cuda.memory_allocated() if self.place() == "cuda" else 0
        with _new_tensors() as alive:
            with self.serving(cache, quant) as backend:
                self.decode(backend, 1, steps=2)
            left = _bytes_beside(alive(), [])
        assert left <= self.buffer_bytes, f"{left} bytes of tensors are alive after close()"
        if self.place() == "cuda":
            left = torch.cuda.memory_allocated() - allocated
            assert left <= 2**20, f"{left} bytes of device memory are allocated after close()"
        del backend

    @_gpu
    def test_allocator_agrees_with_weights(self, cache: str, quant: str) -> None:
        """What the allocator gave out since before the load is weights, cache and small buffers."""
        import torch

        self.place_on_gpu()
        with self.serving(cache, quant) as first:
            self.decode(first, 1, steps=2)
        del first
        gc.collect()
        before = torch.cuda.memory_allocated()
        with self.serving(cache, quant) as backend:
            self.decode(backend, 1, steps=2)
            gc.collect()
            grown = torch.cuda.memory_allocated() - before
            held = _storages(backend.weights().values())
            blocks = len(held) + 2 * self.architecture.layers + 64
            allowed = sum(held.values()) + self.cache_bytes(backend) + self.buffer_bytes + 512 * blocks
            assert grown <= allowed, f"{grown} bytes of device memory are held, weights and cache explain {allowed}"

    @_gpu
    def test_step_never_waits_for_the_device(self, cache: str, quant: str) -> None:
        """No step synchronises with the host."""
        self.place_on_gpu()
        with self.serving(cache, quant) as backend:
            token = backend.prefill(self.prompt(1)).argmax(-1)
            for _ in range(2):
                token = backend.decode_step(token).argmax(-1)
            with _no_synchronisation("decode_step"):
                backend.decode_step(token)

    @_gpu
    def test_step_can_be_captured(self, quant: str, batch_size: int) -> None:
        """A captured step with its argmax and feedback, replayed, decodes the tokens that eager steps do."""
        import torch

        self.place_on_gpu()
        if "cuda_graph" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare cuda_graph")
        with self.serving("static", quant, batch_size, execution="cuda_graph") as backend:
            tokens, logits = self.decode(backend, batch_size, self.steps)
            token = tokens[:, self.prompt_tokens].clone()

            def step() -> Tensor:
                out: Tensor = backend.decode_step(token)
                token.copy_(out.argmax(-1))
                return out

            backend.seek(self.prompt_tokens)
            graph, out = _capture(step)
            backend.seek(self.prompt_tokens)
            token.copy_(tokens[:, self.prompt_tokens])
            for index in range(1, self.steps + 1):
                graph.replay()
                what = f"replay {index} does not give the logits of the eager step"
                _assert_close(out, logits[:, index], what, self.cosine, self.relative_error)
                if index < self.steps:
                    same = torch.equal(token, tokens[:, self.prompt_tokens + index])
                    assert same, f"replay {index} decodes another token than the eager step"
            position = backend.position()
            assert position == self.capacity, f"position() is {position} after {self.steps} replays"
            graph.reset()


def _modules_of(requires: Iterable[Requirement]) -> list[str]:
    """Import names of the required packages, as far as they are installed."""
    wanted = {_canonical(Specifier(requirement.package).name) for requirement in requires}
    if not wanted:
        return []
    modules = importlib.metadata.packages_distributions().items()
    return sorted(module for module, owners in modules if wanted & {_canonical(owner) for owner in owners})


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _skip_without(plugin: Any) -> None:
    """Skip the test if a package that `plugin` requires is not installed in the version that it wants."""
    for requirement in plugin.requires:
        wanted = Specifier(requirement.package)
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{plugin.__name__} needs {requirement.package}: {requirement.install}")
        if not wanted.specifier.contains(found, prereleases=True):
            pytest.skip(f"{plugin.__name__} needs {requirement.package}, found {found}: {requirement.install}")


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _cosine(one: Tensor, two: Tensor) -> float:
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(one.double().flatten(), two.double().flatten(), dim=0))


def _assert_close(got: Tensor, want: Tensor, what: str, cosine: float, relative_error: float) -> None:
    """Fail unless two tensors agree in direction and in their worst element."""
    assert bool(got.isfinite().all()), f"{what} (it holds infinities or NaNs)"
    similarity = _cosine(got, want)
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert similarity >= cosine, f"{what} (cosine {similarity:.5f}, at least {cosine})"
    assert error <= relative_error, f"{what} (relative error {error:.4f}, at most {relative_error})"


def _ulp(values: Tensor, dtype: Any) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at each value's magnitude."""
    import torch

    return values.abs().log2().floor().exp2() * torch.finfo(dtype).eps


@contextmanager
def _new_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """Watch what comes to life inside: the function given tells the tensors alive now and not before.

    What the garbage collector knows at the start is set aside (`gc.freeze`), so what it knows later is new.
    A tensor that only C++ holds escapes it.
    """
    import torch

    def alive() -> list[Tensor]:
        gc.collect()
        # type(), because isinstance asks lazy modules and proxies for a class that they would import
        return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]

    gc.collect()
    gc.freeze()
    try:
        yield alive
    finally:
        gc.unfreeze()


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages behind `tensors`."""
    found = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            continue  # sparse and wrapper tensors have none
        if tensor.device.type != "meta" and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _bytes_beside(live: Iterable[Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages in `live` that are not in `known`."""
    accounted = _storages(known)
    return sum(size for address, size in _storages(live).items() if address not in accounted)


@contextmanager
def _no_synchronisation(what: str) -> Iterator[None]:
    """Fail if torch synchronises the host with the device inside."""
    import torch

    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        raise AssertionError(f"{what} waits for the device: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _capture(step: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """Record `step` into a CUDA graph, after three runs on a side stream as PyTorch asks for.

    Returns:
        The graph and the tensor that a replay writes.
    """
    import torch

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = step()
    except RuntimeError as error:
        raise AssertionError(f"the step cannot be captured into a CUDA graph: {error}") from error
    return graph, out

"""The contract suites on the built-in plugins, and proof that each of their tests can fail.

The second half breaks a plugin in one way at a time and asserts that the test which has to notice does.
"""

# ruff: noqa: RUF012 - the suites' class attributes are set once

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest

from backends.attention.sdpa import Sdpa
from backends.hf import EMBEDDING, HEAD, HfBackend
from backends.quant.nf4 import Nf4
from backends.quant.none import NoQuant
from registry.api import LinearFormat, NoOptions, Requirement, Setup, StepBytes, unsupported
from registry.testing import TINY, AttentionKernelContract, BackendContract, LinearFormatContract
from registry.weights import RandomWeights


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small gain nothing by threads, and wait for them on a shared machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestHf(BackendContract):
    plugin = HfBackend


class TestHfTied(BackendContract):
    plugin = HfBackend
    compiles = False
    architecture = replace(TINY, model_type="llama", qkv_bias=False, tied_embeddings=True)
    formats = ("none",)


class TestNoQuant(LinearFormatContract):
    plugin = NoQuant


class TestNf4(LinearFormatContract):
    plugin = Nf4


class TestNf4DoubleQuant(LinearFormatContract):
    plugin = Nf4
    options = {"double_quant": True}


class TestFp4(LinearFormatContract):
    plugin = Nf4
    options = {"levels": "fp4"}
    weight_cosine = 0.97


class TestSdpa(AttentionKernelContract):
    plugin = Sdpa


class TestSdpaMath(AttentionKernelContract):
    plugin = Sdpa
    options = {"kernel": "math"}


class TestSdpaFlash(AttentionKernelContract):
    plugin = Sdpa
    options = {"kernel": "flash"}


@pytest.mark.gpu
class TestSdpaEfficient(AttentionKernelContract):
    plugin = Sdpa
    options = {"kernel": "efficient"}
    device = "cuda"


@pytest.mark.gpu
class TestSdpaCudnn(AttentionKernelContract):
    plugin = Sdpa
    options = {"kernel": "cudnn"}
    device = "cuda"


def suite(contract: type, plugin: type, **attributes: Any) -> Any:
    """A suite on the CPU, ready to have its tests called one by one."""
    return type("Suite", (contract,), {"plugin": plugin, "device": "cpu", **attributes})()


# Attention kernels, broken


class IgnoresMask(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        return super().decode(q, k, v, kv_len=kv_len, scale=scale)


class ReadsOneRowTooFew(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        if mask is not None:
            mask = mask & mask.roll(-1, -1)
        return super().decode(q, k, v, kv_len=kv_len, scale=scale, mask=mask)


class GuessesScale(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        return super().decode(q, k, v, kv_len=kv_len, scale=q.shape[-1] ** -0.5, mask=mask)


class SwapsHeads(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        return super().decode(q, k.flip(1), v.flip(1), kv_len=kv_len, scale=scale, mask=mask)


class AnswersInFloat32(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        return super().decode(q, k, v, kv_len=kv_len, scale=scale, mask=mask).float()


class ScalesInPlace(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        return super().decode(q.mul_(scale), k, v, kv_len=kv_len, scale=1.0, mask=mask)


class KeepsALayersKeys(Sdpa):
    keys: Any = None

    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        if self.keys is not None and self.keys.shape == k.shape:
            k = k.lerp(self.keys, 0.5)
        self.keys = k
        return super().decode(q, k, v, kv_len=kv_len, scale=scale, mask=mask)


class ForgetsTheMaskCompiled(Sdpa):
    def decode(self, q, k, v, *, kv_len, scale, mask=None):
        import torch

        if torch.compiler.is_compiling():
            mask = None
        return super().decode(q, k, v, kv_len=kv_len, scale=scale, mask=mask)


class RefusesEveryShape(Sdpa):
    def plan(self, shape):
        raise unsupported("no shape is good enough")


@pytest.mark.parametrize(
    ("plugin", "test", "words"),
    [
        (IgnoresMask, "test_decode_is_attention", "not the attention over the valid rows"),
        (ReadsOneRowTooFew, "test_decode_is_attention", "not the attention over the valid rows"),
        (GuessesScale, "test_decode_is_attention", "not the attention over the valid rows"),
        (SwapsHeads, "test_decode_is_attention", "not the attention over the valid rows"),
        (AnswersInFloat32, "test_decode_is_attention", "bfloat16 in, torch.float32 out"),
        (ScalesInPlace, "test_decode_leaves_everything_as_it_was", "changes its q"),
        (KeepsALayersKeys, "test_decode_leaves_everything_as_it_was", "after another one"),
        (ForgetsTheMaskCompiled, "test_decode_can_be_compiled", "given 2 valid rows, does not attend to those"),
    ],
)
def test_broken_attention_is_found(plugin, test, words):
    arguments = ("static", 1) if test == "test_decode_is_attention" else ("static",)
    with pytest.raises(AssertionError, match=words):
        getattr(suite(AttentionKernelContract, plugin), test)(*arguments)


def test_attention_that_refuses_everything_is_found():
    refusing = suite(AttentionKernelContract, RefusesEveryShape)
    with pytest.raises(AssertionError, match="refuses every shape"):
        refusing.test_some_shape_is_served()
    with pytest.raises(pytest.skip.Exception):
        refusing.test_decode_is_attention("static", 1)


# Linear formats, broken


class LiesAboutItsWeight(NoQuant):
    def dequantize(self, module):
        return super().dequantize(module) * 1.05


class DropsBias(NoQuant):
    def convert(self, linear):
        linear.bias = None
        return linear


class RenamesBias(NoQuant):
    def convert(self, linear):
        linear.offset, linear.bias = linear.bias, None
        linear.register_forward_hook(lambda layer, _, out: out if layer.offset is None else out + layer.offset)
        return linear


class Widens(NoQuant):
    def stored(self, module):
        return [tensor.float() for tensor in super().stored(module)]


class CountsTwice(NoQuant):
    def stored(self, module):
        return [*super().stored(module), module.weight.data]


class ForgetsBias(NoQuant):
    def stored(self, module):
        return [module.weight]


class KeepsTheOriginal(NoQuant):
    def convert(self, linear):
        linear.original = [linear.weight.detach().clone()]
        return linear


class HandsOutItsBuffer(NoQuant):
    def convert(self, linear):
        import torch

        linear.out = torch.empty(0)

        def kept(layer, _, out):
            if layer.out.shape != out.shape:
                layer.out = torch.empty_like(out)
            return layer.out.copy_(out)

        linear.register_forward_hook(kept)
        return linear


class WritesIntoItsInput(NoQuant):
    def convert(self, linear):
        linear.register_forward_pre_hook(lambda _, given: given[0].mul_(1.5))
        return linear


class HandsOutItsBias(NoQuant):
    def convert(self, linear):
        linear.register_forward_hook(lambda layer, _, out: layer.bias.copy_(out[0]).expand_as(out))
        return linear


class DropsHalf(NoQuant):
    def convert(self, linear):
        linear.weight[:, ::2] = 0
        return linear


class IsRandom(NoQuant):
    def convert(self, linear):
        import torch

        linear.weight += torch.randn_like(linear.weight) * 1e-3
        return linear


class ConsumesItself(NoQuant):
    def dequantize(self, module):
        module.weight += 1e-3
        return super().dequantize(module)


class DividesByZero(NoQuant):
    def convert(self, linear):
        scale = linear.weight.abs().amax(1, keepdim=True)
        linear.weight.copy_(linear.weight / scale * scale)
        return linear


class DoublesCompiled(NoQuant):
    def convert(self, linear):
        import torch

        linear.register_forward_hook(lambda layer, _, out: out * 2 if torch.compiler.is_compiling() else out)
        return linear


class RefusesEveryLayer(NoQuant):
    def convert(self, linear):
        raise unsupported("no layer is good enough")


@pytest.mark.parametrize(
    ("plugin", "test", "words"),
    [
        (
            LiesAboutItsWeight,
            "test_output_is_the_product_with_its_own_weight",
            "not the product with the weight",
        ),
        (DividesByZero, "test_output_is_the_product_with_its_own_weight", "infinities or NaNs"),
        (DropsBias, "test_output_is_the_product_with_its_own_weight", "not the product with the weight"),
        (DropsBias, "test_bias_is_exact", "does not give the bias"),
        (RenamesBias, "test_bias_is_exact", r"what bias\(\) tells"),
        (HandsOutItsBuffer, "test_an_output_is_its_caller_s", "written into an earlier output"),
        (WritesIntoItsInput, "test_an_output_is_its_caller_s", "changes its input"),
        (HandsOutItsBias, "test_an_output_is_its_caller_s", "changes the next product"),
        (
            DropsHalf,
            "test_dequantize_gives_the_original_weight",
            "cosine between dequantize and the original",
        ),
        (ConsumesItself, "test_dequantize_changes_nothing", "dequantize"),
        (Widens, "test_stored_is_small_and_counted_once", "the unquantised layer"),
        (CountsTwice, "test_stored_is_small_and_counted_once", "more than once"),
        (ForgetsBias, "test_stored_is_all_that_is_held", "bytes that are not in stored"),
        (KeepsTheOriginal, "test_stored_is_all_that_is_held", "bytes that are not in stored"),
        (IsRandom, "test_conversion_is_deterministic", "gives two weights"),
        (DoublesCompiled, "test_product_can_be_compiled", "the compiled product differs"),
        (RefusesEveryLayer, "test_bias_is_exact", "refuses every layer"),
    ],
)
def test_broken_format_is_found(plugin, test, words):
    arguments = (True,) if test.endswith(("its_own_weight", "counted_once")) else ()
    with pytest.raises(AssertionError, match=words):
        getattr(suite(LinearFormatContract, plugin), test)(*arguments)


# Backends, broken


class SeeksNothing(HfBackend):
    def seek(self, position):
        pass


class SeeksByCounterOnly(HfBackend):
    """Forgets that a later token of the same place has overwritten the row."""

    def seek(self, position):
        super().seek(position)
        for layer in self.cache.layers:
            layer.keys[:, :, 3] = 0


class ForgetsToAdvance(HfBackend):
    def decode_step(self, token):
        logits = super().decode_step(token)
        self.seek(self.position() - 1)
        return logits


class ForgetsTheHead(HfBackend):
    def weights(self):
        held = dict(super().weights())
        del held[f"{HEAD}.weight"]
        return held


class CountsTheEmbedding(HfBackend):
    def bytes_per_step(self, context):
        told = super().bytes_per_step(context)
        return StepBytes(told.weights + self.weights()[EMBEDDING].nbytes, told.kv)


class ForgetsStreams(HfBackend):
    def bytes_per_step(self, context):
        told = super().bytes_per_step(context)
        return StepBytes(told.weights, told.kv / self.setup.batch_size)


class HidesACopy(HfBackend):
    def load(self, capacity):
        super().load(capacity)
        self.copy = self.model.lm_head.weight.float()


class IgnoresTheSeed(HfBackend):
    def __init__(self, setup: Setup) -> None:
        super().__init__(replace(setup, weights=RandomWeights(0)))


class IsNoisy(HfBackend):
    def decode_step(self, token):
        import torch

        logits = super().decode_step(token)
        return logits + torch.randn_like(logits) * 0.1


class NeverCloses(HfBackend):
    def close(self):
        self._attention.remove()


class SwapsLayers(HfBackend):
    """Consistent with itself, and yet not the model that it was given."""

    def load(self, capacity):
        super().load(capacity)
        one, two = self.model.model.layers[:2]
        one.mlp, two.mlp = two.mlp, one.mlp


class IgnoresTheFormat(HfBackend):
    def __init__(self, setup: Setup) -> None:
        super().__init__(replace(setup, linear=NoQuant(NoOptions())))


class LosesANorm(HfBackend):
    def dequantized(self):
        for name, tensor in super().dequantized():
            yield name, tensor * 0 + 1 if name == "model.layers.0.input_layernorm.weight" else tensor


class LeavesOutBiases(HfBackend):
    def dequantized(self):
        return ((name, tensor) for name, tensor in super().dequantized() if not name.endswith("bias"))


class MistakesThePosition(HfBackend):
    def decode_step(self, token):
        late = token.new_full((1, 1), self.position() + 1)
        out = self.model(input_ids=token[:, None], past_key_values=self.cache, position_ids=late)
        return out.logits[:, -1]


class MixesStreams(HfBackend):
    def decode_step(self, token):
        return super().decode_step(token).flip(0)


class ChoosesTheLast(HfBackend):
    def choose(self, logits, token):
        token.copy_(logits.shape[-1] - 1 - logits.flip(-1).argmax(-1))


class ChoosesForAnother(HfBackend):
    def choose(self, logits, token):
        token.copy_(logits.argmax(-1).flip(0))


class FlipsCompiled(HfBackend):
    def decode_step(self, token):
        import torch

        logits = super().decode_step(token)
        return logits.flip(-1) if torch.compiler.is_compiling() else logits


class RefusesEveryCell(HfBackend):
    @classmethod
    def check(cls, request):
        raise unsupported("no cell is good enough")


@pytest.mark.parametrize(
    ("plugin", "test", "arguments", "words"),
    [
        (ForgetsToAdvance, "test_cache_grows_by_one_a_step", ("static", 1), "after 1 steps, not 13"),
        (ForgetsToAdvance, "test_steps_equal_a_full_forward", ("dynamic", "none", 1), "step 2"),
        (MixesStreams, "test_steps_equal_a_full_forward", ("static", "none", 3), "step 1, stream 0"),
        (MistakesThePosition, "test_steps_equal_a_full_forward", ("dynamic", "none", 1), "step 1"),
        (LosesANorm, "test_steps_equal_a_full_forward", ("static", "none", 1), "the reference"),
        (ChoosesTheLast, "test_choice_is_the_first_of_the_largest", ("dynamic", 1), "of zeros"),
        (ChoosesForAnother, "test_choice_is_the_first_of_the_largest", ("static", 3), "of random logits"),
        (SeeksNothing, "test_seek_brings_back_the_logits", ("static", "none", 1), r"after seek\(12\)"),
        (SeeksByCounterOnly, "test_seek_brings_back_the_logits", ("static", "none", 1), "the same logits"),
        (SeeksNothing, "test_seek_to_the_start_empties_the_cache", ("static",), r"after seek\(0\)"),
        (ForgetsTheHead, "test_nothing_large_is_held_beside_weights_and_cache", ("static", "none"), "beside"),
        (HidesACopy, "test_nothing_large_is_held_beside_weights_and_cache", ("dynamic", "none"), "beside"),
        (CountsTheEmbedding, "test_weight_bytes_are_the_tensors_held", ("static", "none", 1), "weight bytes"),
        (ForgetsStreams, "test_kv_bytes_follow_the_context", ("static", 3), "KV bytes"),
        (IgnoresTheSeed, "test_seed_determines_the_logits", ("static", "none"), "another seed"),
        (IsNoisy, "test_seed_determines_the_logits", ("static", "none"), "do not agree"),
        (NeverCloses, "test_close_releases_the_memory", ("static", "none"), "alive after close"),
        (SwapsLayers, "test_dequantized_are_the_models_weights", ("static", "none"), "weight source"),
        (SwapsLayers, "test_dequantized_are_the_models_weights", ("static", "nf4"), "weight source"),
        (LeavesOutBiases, "test_dequantized_are_the_models_weights", ("static", "none"), "lacks"),
        (IgnoresTheFormat, "test_linear_layers_are_the_formats", ("static", "nf4"), "never asked"),
        (ForgetsTheHead, "test_hosts_are_names", (), "formats"),
        (FlipsCompiled, "test_step_can_be_compiled", (), "the compiled step's logits correlate"),
        (RefusesEveryCell, "test_some_combination_is_served", (), "refuses every combination"),
    ],
)
def test_broken_backend_is_found(plugin, test, arguments, words, monkeypatch):
    if test == "test_hosts_are_names":
        monkeypatch.setattr(plugin, "formats", "none")
    with pytest.raises(AssertionError, match=words):
        getattr(suite(BackendContract, plugin), test)(*arguments)


# Declarations, broken


@dataclass(frozen=True)
class OpenOptions:
    group_size: int


@pytest.mark.parametrize(
    ("attribute", "value", "test", "words"),
    [
        ("executions", ("cuda_graph",), "test_declarations_are_known_and_consistent", "lacks eager"),
        ("executions", ("eager", "fast"), "test_declarations_are_known_and_consistent", "known: eager"),
        ("devices", ("tpu",), "test_declarations_are_known_and_consistent", "known: cpu"),
        ("devices", ("cpu",), "test_declarations_are_known_and_consistent", "CUDA is not among"),
        ("caches", "static", "test_declarations_are_known_and_consistent", "tuple of names"),
        ("caches", (), "test_declarations_are_known_and_consistent", "no cell can ever"),
        ("caches", ("dynamic",), "test_declarations_are_known_and_consistent", "needs a static cache"),
        ("min_capability", 8.0, "test_min_capability_is_a_version", "is the form"),
        ("requires", ("numpy",), "test_requirements_can_be_read", "no Requirement"),
        (
            "requires",
            (Requirement("a b", "pip install a"),),
            "test_requirements_can_be_read",
            "is no package",
        ),
        ("requires", (Requirement("a>=1", " "),), "test_requirements_can_be_read", "without the command"),
        ("Options", {"kernel": "fast"}, "test_options_have_defaults", "no class"),
        ("Options", int, "test_options_have_defaults", "no dataclass"),
        ("Options", OpenOptions, "test_options_have_defaults", "group_size"),
    ],
)
def test_broken_declaration_is_found(attribute, value, test, words):
    plugin = type("Broken", (NoQuant,), {attribute: value})
    with pytest.raises(AssertionError, match=words):
        getattr(suite(LinearFormatContract, plugin), test)()


def test_incomplete_plugin_is_found():
    incomplete = type("Incomplete", (LinearFormat,), {"convert": NoQuant.convert})
    with pytest.raises(AssertionError, match="no AttentionKernel"):
        suite(AttentionKernelContract, NoQuant).test_class_is_a_complete_plugin()
    with pytest.raises(AssertionError, match="lacks dequantize"):
        suite(LinearFormatContract, incomplete).test_class_is_a_complete_plugin()


@pytest.mark.parametrize("heavy", ["torch", "packaging"])
def test_heavy_import_is_found(heavy, tmp_path, monkeypatch):
    source = (
        f"import {heavy}\n"
        "from backends.quant.none import NoQuant\n"
        "from registry.api import Requirement\n"
        "class Heavy(NoQuant):\n"
        "    requires = (Requirement('packaging', 'pip install packaging'),)\n"
    )
    (tmp_path / f"brings_{heavy}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    plugin = importlib.import_module(f"brings_{heavy}").Heavy
    with pytest.raises(AssertionError, match=f"imports {heavy}"):
        suite(LinearFormatContract, plugin).test_import_is_light()


def test_missing_requirement_skips_with_the_command():
    plugin = type("Needy", (NoQuant,), {"requires": (Requirement("rfloor-needs-this", "pip install it"),)})
    with pytest.raises(pytest.skip.Exception, match="pip install it"):
        suite(LinearFormatContract, plugin).test_bias_is_exact()

"""GPTQ and AWQ through gptqmodel: the contract, the layouts, and folders that their own loaders read."""

# ruff: noqa: RUF012 - the suites' class attributes are set once

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from backends.hf import HfBackend
from backends.quant import groupwise
from backends.quant.awq import Awq
from backends.quant.gptq import Gptq
from backends.quant.layouts import in_order
from registry.outcome import Outcome, Refused
from registry.synthesis import write_checkpoint
from registry.testing import TINY, BackendContract, LinearFormatContract
from registry.weights import FolderWeights, RandomWeights

pytest.importorskip("gptqmodel")


# Beside the kernel's own, a layer that is converted in memory keeps the checkpoint's tensors for `dequantize`.
CHECKPOINT_BYTES = 70_000


class TestGptqTorch(LinearFormatContract):
    plugin = Gptq
    options = {"group_size": 64}
    workspace_bytes = CHECKPOINT_BYTES


class TestAwqTorch(LinearFormatContract):
    plugin = Awq
    options = {"group_size": 64}
    workspace_bytes = CHECKPOINT_BYTES


class TestHf(BackendContract):
    """Both formats in a body, converted there."""

    plugin = HfBackend
    formats = ("gptq", "awq")
    compiles = False
    buffer_bytes = 2**20  # the checkpoint's tensors, for `dequantize`


@pytest.mark.gpu
class TestGptqMarlin(TestGptqTorch):
    options = {"group_size": 64, "kernel": "marlin"}
    device = "cuda"


@pytest.mark.gpu
class TestGptqExllamav2(TestGptqTorch):
    options = {"group_size": 64, "kernel": "exllamav2"}
    device = "cuda"
    workspace_bytes = CHECKPOINT_BYTES + 2 * 256 * 320  # where a long input's weight is dequantised


@pytest.mark.gpu
class TestGptqTriton(TestGptqTorch):
    options = {"group_size": 64, "kernel": "triton"}
    device = "cuda"


@pytest.mark.gpu
class TestAwqGemm(TestAwqTorch):
    options = {"group_size": 64, "kernel": "gemm"}
    device = "cuda"


@pytest.mark.gpu
class TestAwqMarlin(TestAwqTorch):
    options = {"group_size": 64, "kernel": "marlin"}
    device = "cuda"


# Layouts


@pytest.mark.parametrize("order", [groupwise.PLAIN_ORDER, groupwise.AWQ_ORDER])
def test_packing_is_undone(order):
    codes = torch.randint(16, (24, 40), dtype=torch.uint8)
    words = groupwise.pack_columns(codes, order)
    assert (words.shape, words.dtype) == ((24, 5), torch.int32)
    assert torch.equal(groupwise.unpack_columns(words, order), codes)
    assert torch.equal(groupwise.unpack_rows(groupwise.pack_rows(codes)), codes)


def test_codes_are_the_nearest():
    # Seeded: 15 steps of a scale that float16 rounded end up to .507 of it short of the range, for 4 % of all draws.
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for quantise in (groupwise.symmetric, groupwise.asymmetric):
        quantised = quantise(weight, 32)
        levels = [
            groupwise.dequantize(quantised._replace(codes=torch.full_like(quantised.codes, n))) for n in range(16)
        ]
        off = torch.stack([(level - weight).abs() for level in levels])
        chosen = off.gather(0, quantised.codes.long()[None])[0]
        assert (chosen <= off.amin(0) + 1e-6).all()
        error = (groupwise.dequantize(quantised) - weight).unflatten(1, (4, 32)).abs().amax(-1)
        assert (error <= quantised.scales.float() * 0.502).all()
        assert quantised.codes.max() <= 15


def test_gptq_is_read_as_gptqmodel_reads_it():
    """Our packing, gptqmodel's own unpacking."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linear = torch.nn.Linear(128, 64, bias=False)
    form = Gptq(Gptq.Options(group_size=32))
    tensors = form.encode(linear.weight.data, "")
    theirs = TorchLinear(4, 32, sym=True, desc_act=False, in_features=128, out_features=64, pack_dtype=torch.int32)
    for name, tensor in tensors.items():
        assert theirs.get_buffer(name).shape == tensor.shape
        theirs.register_buffer(name, tensor.clone())
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    convert_gptq_v1_to_v2_format_module(theirs, bits=4, pack_dtype=torch.int32)
    theirs.eval()
    assert torch.allclose(theirs.dequantize_weight().T.float(), form.decode(tensors), atol=1e-4)


def test_awq_is_read_as_gptqmodel_reads_it():
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    form = Awq(Awq.Options(group_size=32))
    tensors = form.encode(torch.randn(64, 128) * 0.05, "")
    theirs = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32)
    assert torch.allclose(theirs.T.float(), form.decode(tensors), atol=1e-4)


LOADER = """
import sys
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file
folder, kernel, question, answer = sys.argv[1:]
model = GPTQModel.load(folder, device="cpu", backend=BACKEND(kernel)).model
save_file({"logits": model(load_file(question)["tokens"]).logits.float().detach()}, answer)
"""
"""In a process of its own: the loader sets environment variables and leaves temporary folders to the collector."""


@pytest.mark.parametrize(("plugin", "kernel"), [(Gptq, "gptq_torch"), (Awq, "awq_torch")])
def test_folders_are_read_by_gptqmodel(plugin, kernel, tmp_path):
    """gptqmodel's own loader and its torch kernels, against our decoder and plain transformers."""
    form = plugin(plugin.Options(group_size=32))
    folder = tmp_path / "model"
    write_checkpoint(folder, TINY, RandomWeights(0), form, "cpu", lambda _: None)
    tokens = torch.randint(TINY.vocab, (1, 20))
    save_file({"tokens": tokens}, tmp_path / "question")
    call = [sys.executable, "-c", LOADER, folder, kernel, tmp_path / "question", tmp_path / "answer"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "answer")["logits"]

    source, model = FolderWeights(folder), AutoModelForCausalLM.from_config(TINY.transformers_config()).float()
    weights = {}
    for name, parameter in model.named_parameters():
        packed = source.quantised(name.rpartition(".")[0], "cpu") if name.endswith("proj.weight") else {}
        shape = tuple(parameter.shape)
        weights[name] = form.decode(packed) if packed else source.tensor(name, shape, torch.float32, "cpu")
    model.load_state_dict(weights)
    with torch.inference_mode():
        want = model(tokens).logits
    assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() > 0.999


# What a kernel is handed


@pytest.mark.parametrize("plugin", [Gptq, Awq])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_scale_that_is_no_number_is_refused(plugin, value):
    form = plugin(plugin.Options(group_size=64))
    tensors = form.encode(torch.randn(64, 128), "")
    tensors["scales"][1, 5] = value
    linear = torch.nn.Linear(128, 64, bias=False, device="meta", dtype=torch.bfloat16)
    with pytest.raises(Refused, match="a scale is infinite or no number") as caught:
        form.from_tensors(linear, tensors)
    assert caught.value.refusal.outcome is Outcome.UNSUPPORTED


def test_an_index_of_groups_in_order_is_not_an_activation_order():
    tensors = Gptq(Gptq.Options(group_size=32)).encode(torch.randn(64, 128), "")
    assert in_order(tensors["g_idx"], 32)
    assert not in_order(tensors["g_idx"], 64)
    assert not in_order(tensors["g_idx"].flip(0), 32)
    assert not in_order(tensors["g_idx"][torch.randperm(128)], 32)
    assert not in_order(torch.zeros(128), 32)


def test_the_exllamav2_kernel_is_handed_an_index_only_where_it_says_something():
    form = Gptq(Gptq.Options(group_size=32, kernel="exllamav2"))
    tensors = form.encode(torch.randn(64, 128), "")
    assert not form.prepared(tensors, "ExllamaV2Linear", torch.bfloat16)["g_idx"].any()
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    assert torch.equal(form.prepared(tensors, "ExllamaV2Linear", torch.bfloat16)["g_idx"], tensors["g_idx"])

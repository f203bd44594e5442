"""FlashInfer and FlashAttention on their own kernels; FlashInfer compiles for minutes the first time."""

# ruff: noqa: RUF012 - the suites' class attributes are set once

import dataclasses

import pytest

from backends.attention.flash_attn import FlashAttention2, FlashAttention3
from backends.attention.flashinfer import FlashInfer
from backends.hf import HfBackend
from registry.testing import TINY, AttentionKernelContract, BackendContract

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]


class TestFlashInfer(AttentionKernelContract):
    plugin = FlashInfer
    device = "cuda"


class TestFlashInferTensorCores(AttentionKernelContract):
    plugin = FlashInfer
    options = {"tensor_cores": "always"}
    device = "cuda"


class TestFlashAttention2(AttentionKernelContract):
    plugin = FlashAttention2
    device = "cuda"


class TestFlashAttention3(AttentionKernelContract):
    plugin = FlashAttention3
    device = "cuda"


# A cache of a context and its steps: most chunks or splits are behind the shorter lengths.


class TestFlashInferLong(TestFlashInfer):
    groups = (4, 7)
    head_dims = (128,)
    capacity = 2083
    lengths = (2, 127, 128, 129, 256, 1919, 2048, 2082, 2083)


class TestFlashInferTensorCoresLong(TestFlashInferLong):
    options = {"tensor_cores": "always"}


class TestFlashAttention2Long(TestFlashInferLong):
    plugin = FlashAttention2


class TestFlashAttention3Long(TestFlashInferLong):
    plugin = FlashAttention3


# In transformers' model.


class TestHfOnFlashInfer(BackendContract):
    plugin = HfBackend
    formats = ("none",)
    architecture = dataclasses.replace(TINY, head_dim=64)
    device = "cuda"
    attention = "flashinfer"
    buffer_bytes = 2**20  # where plans are kept


class TestHfOnFlashAttention2(TestHfOnFlashInfer):
    attention = "fa2"
    buffer_bytes = 2048


class TestHfOnFlashAttention3(TestHfOnFlashInfer):
    attention = "fa3"
    buffer_bytes = 2048

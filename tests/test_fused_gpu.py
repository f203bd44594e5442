"""The fused step on whole models: how far from float32 it is beside transformers' bf16 step, and what it holds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.fused.body import FusedBackend
from backends.hf import HfBackend
from registry.api import Architecture, Backend, NoOptions, Setup
from registry.capture import capture
from registry.compose import Composer
from registry.plugins import Catalog
from registry.testing.tensors import ulp
from registry.weights import RandomWeights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

CONTEXT, STEPS = 2048, 256
REPEATS = 100
WORSE = 1.2
"""By what factor the step's error may be larger than that of transformers' bf16 step."""
MARGIN_ULPS = 6.0  # as registry.testing.BackendContract has it
MODELS = ("qwen2.5-0.5b", "qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def loaded(
    plugin: type[Backend], composer: Composer, model: str, quant: str, batch: int, context: int, seed: int
) -> Iterator[Any]:
    linear = Catalog().load("quant", quant)
    backend = plugin(
        Setup(
            Architecture.of(composer.cell([f"model={model}"]).model),
            RandomWeights(seed),
            "cuda",
            torch.bfloat16,
            batch,
            "static",
            linear(linear.Options()),
            Sdpa(SdpaOptions()),
            NoOptions(),
        )
    )
    backend.load(context + STEPS)
    try:
        yield backend
    finally:
        backend.close()


def prompt(architecture: Architecture, batch: int, context: int, seed: int) -> torch.Tensor:
    numbers = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(architecture.vocab, (batch, context), generator=numbers, device="cuda")


def greedy(backend: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, and the logits of each step."""
    logits = [backend.prefill(tokens).float()]
    for _ in range(STEPS):
        token = logits[-1].argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], 1)
        logits.append(backend.decode_step(token).float())
    return tokens, torch.stack(logits[1:], 1)


def fed(backend: Any, tokens: torch.Tensor, context: int) -> torch.Tensor:
    """The logits of each step on given tokens."""
    backend.prefill(tokens[:, :context])
    steps = tokens[:, context:].unbind(1)
    return torch.stack([backend.decode_step(token.contiguous()).float() for token in steps], 1)


def in_float32(backend: Any, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """What a plain model with the same weights says in float32, one stream at a time."""
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        config = backend.setup.architecture.transformers_config()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    for name, tensor in backend.dequantized():
        model.get_parameter(name).copy_(tensor)
    return torch.cat([model(one[None], logits_to_keep=steps).logits for one in tokens])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_as_near_to_float32_as_transformers(composer: Composer, model: str, quant: str, batch: int) -> None:
    seed = torch.seed() % 2**31  # fresh weights and a fresh cache each time; the failure names it
    with loaded(FusedBackend, composer, model, quant, batch, CONTEXT, seed) as fused:
        given = prompt(fused.setup.architecture, batch, CONTEXT, seed)
        tokens, logits = greedy(fused, given)
        wanted = in_float32(fused, tokens, STEPS)
    gc.collect()
    torch.cuda.empty_cache()
    with loaded(HfBackend, composer, model, quant, batch, CONTEXT, seed) as transformers:
        theirs = error(fed(transformers, tokens, CONTEXT), wanted)
    ours = error(logits, wanted)
    assert ours <= WORSE * theirs, f"seed {seed}: {ours:.5f} against {theirs:.5f}"
    best = wanted.topk(2, -1).values
    decisive = best[..., 0] - best[..., 1] > MARGIN_ULPS * ulp(best[..., 0], torch.bfloat16)
    assert decisive.any()
    wrong = decisive & (logits.argmax(-1) != wanted.argmax(-1))
    assert not wrong.any(), f"seed {seed}: other tokens at {wrong.nonzero().tolist()[:5]}"


@pytest.mark.parametrize("context", [512, 777, 8192, 16384])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_lengths(composer: Composer, context: int, batch: int) -> None:
    seed = torch.seed() % 2**31
    with loaded(FusedBackend, composer, "qwen2.5-0.5b", "none", batch, context, seed) as fused:
        given = prompt(fused.setup.architecture, batch, context, seed)
        tokens, logits = greedy(fused, given)
        wanted = in_float32(fused, tokens, STEPS)
    assert error(logits, wanted) < 0.03, f"seed {seed}"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("quant", ["none", "int4", "nf4"])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-7b"])
def test_a_step_gives_the_same_bits_each_time(composer: Composer, model: str, quant: str, batch: int) -> None:
    """Captured or not. Kernels that come up early and read what is not there yet would not."""
    seed = torch.seed() % 2**31
    with loaded(FusedBackend, composer, model, quant, batch, CONTEXT, seed) as fused:
        token = fused.prefill(prompt(fused.setup.architecture, batch, CONTEXT, seed)).argmax(-1)
        wanted = fused.decode_step(token).clone()
        held: list[torch.Tensor] = []

        def step() -> None:
            held[:] = [fused.decode_step(token)]

        graph = capture("the step", step, step)
        for number in range(REPEATS):
            fused.seek(CONTEXT)
            graph.replay()
            assert torch.equal(held[0], wanted), f"seed {seed}: replay {number} differs"
            fused.seek(CONTEXT)
            assert torch.equal(fused.decode_step(token), wanted), f"seed {seed}: step {number} differs"


@pytest.mark.parametrize("quant", ["none", "int4", "nf4"])
def test_decoding_holds_weights_and_cache_and_little_more(composer: Composer, quant: str) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with loaded(FusedBackend, composer, "qwen2.5-7b", quant, 1, CONTEXT, 0) as fused:
        token = fused.prefill(prompt(fused.setup.architecture, 1, CONTEXT, 0)).argmax(-1)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(8):
            token = fused.decode_step(token).argmax(-1)
        peak = torch.cuda.max_memory_allocated() - before
        a = fused.setup.architecture
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fused.weights().values()}
        assert peak <= 1.03 * (sum(storages.values()) + a.kv_bytes_per_token() * (CONTEXT + STEPS))

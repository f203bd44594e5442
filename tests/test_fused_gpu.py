"""The fused step on whole models: how far from float32 it is beside transformers' bf16 step, and what it holds."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.fused.body import FusedBackend
from backends.hf import HfBackend
from backends.int4.product import Int4Linear
from backends.int4.stacked import Part
from backends.quant.gptqmodel_linear import GroupwiseLinear
from backends.quant.nf4 import Nf4
from backends.quant.none import NoQuant
from registry.api import HEAD, Architecture, Backend, NoOptions, Setup
from registry.capture import capture
from registry.compose import Composer
from registry.measure import measure
from registry.plugins import Catalog
from registry.testing.contract import skip_without
from registry.testing.tensors import storages, ulp
from registry.weights import RandomWeights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

CONTEXT, STEPS = 2048, 256
COMPARED = 64
"""Steps that transformers takes too: the host launches each of its kernels, which is most of what a test takes."""
REPEATS = 100
WORSE = 1.2
"""By what factor the step's error may be larger than that of transformers' bf16 step."""
MOST = 1.03
"""Of the bytes of weights and cache, what may be allocated while decoding."""
MARGIN_ULPS = 6.0  # as registry.testing.BackendContract has it
SMALL, LARGE = "qwen2.5-0.5b", "qwen2.5-7b"
MODELS = (SMALL, LARGE, "mistral-7b-v0.3", "llama-3.1-8b")
CASES = [
    *((model, quant, batch, CONTEXT) for model in MODELS for quant in ("none", "int4") for batch in (1, 4)),
    *((model, "int4-head4", batch, CONTEXT) for model in (SMALL, LARGE) for batch in (1, 4)),
    *((LARGE, quant, batch, CONTEXT) for quant, batch in (("nf4", 1), ("gptq-marlin", 4), ("awq-marlin", 1))),
    (LARGE, "none", 2, CONTEXT),
    *((LARGE, quant, 1, 16384) for quant in ("none", "int4-head4")),
]
"""Model, quant, streams and context."""
HELD = [
    *((model, quant, batch) for model in (SMALL, LARGE) for quant in ("none", "int4-head4") for batch in (1, 4)),
    *((model, quant, 1) for model, quant in ((LARGE, "nf4"), (MODELS[2], "none"), (MODELS[3], "int4"))),
]
"""Model, quant and streams of a cell of which memory is counted."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def serving(plugin: type[Backend], setup: Setup, capacity: int) -> Iterator[Any]:
    backend = plugin(setup)
    backend.load(capacity)
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def loaded(composer: Composer, model: str, quant: str, batch: int, context: int, seed: int) -> Iterator[Any]:
    """The fused step with the format and the options that conf/quant has under this name."""
    cell = composer.cell([f"model={model}", f"quant={quant}"])
    linear = Catalog().load("quant", cell.quant.plugin)
    skip_without(linear)
    setup = Setup(
        Architecture.of(cell.model),
        RandomWeights(seed),
        "cuda",
        torch.bfloat16,
        batch,
        "static",
        linear(linear.Options(**cell.quant.options)),
        Sdpa(SdpaOptions()),
        NoOptions(),
    )
    with serving(FusedBackend, setup, context + STEPS) as backend:
        yield backend


class Given:
    """Weights that are there already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any, device: str) -> torch.Tensor:
        """See `WeightSource.tensor`."""
        tensor = self.tensors[name].to(device, dtype)
        assert tensor.shape == shape
        return tensor

    def quantised(self, layer: str, device: str) -> Mapping[str, torch.Tensor]:
        """See `WeightSource.quantised`."""
        return {}


def with_own_head(backend: Any) -> Architecture:
    """The model, its head not tied to the embedding where the format rounded it."""
    a = backend.setup.architecture
    return replace(a, tied_embeddings=a.tied_embeddings and HEAD not in backend._converted)


def plain(backend: Any) -> Setup:
    """The same model in bf16, its weights those that the format rounded to: every product is torch's."""
    weights = Given(dict(backend.dequantized()))
    made = {"architecture": with_own_head(backend), "weights": weights, "linear": NoQuant(NoOptions())}
    return replace(backend.setup, **made)


def unrounded(backend: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """`dequantized`, a packed weight as what it stands for in float32 instead of rounded to bf16."""
    form = backend.setup.linear
    for name, tensor in backend.dequantized():
        layer = backend._converted.get(name.removesuffix(".weight"))
        if isinstance(layer, Int4Linear | Part):
            yield name, layer.exact()
        elif layer is not None and isinstance(form, GroupwiseLinear):
            yield name, form.decode({leaf: stored.to(tensor.device) for leaf, stored in layer.told.tensors.items()})
        elif layer is not None and isinstance(form, Nf4):
            yield name, blockwise(layer.weight.data, layer.weight.quant_state)
        else:
            yield name, tensor


def blockwise(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' 4-bit weight out of its levels: the earlier of two in a byte's upper half."""
    codes = packed.flatten().int()
    levels = state.code.float()[torch.stack([codes >> 4, codes & 15], 1).flatten()]
    return (levels.unflatten(0, (-1, state.blocksize)) * state.absmax[:, None]).view(state.shape)


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
        config = with_own_head(backend).transformers_config()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    for name, tensor in unrounded(backend):
        model.get_parameter(name).copy_(tensor)
    return torch.cat([model(one[None], logits_to_keep=steps).logits for one in tokens])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("model", "quant", "batch", "context"), CASES)
def test_it_is_as_near_to_float32_as_transformers(
    composer: Composer, model: str, quant: str, batch: int, context: int
) -> None:
    """Beside transformers' own step in bf16, whose products are torch's, with the weights that the format rounded to.

    What both are held against has the weights in float32: that bf16 does not hold them is a part of theirs.
    """
    seed = torch.seed() % 2**31  # fresh weights and a fresh cache each time; the failure names it
    with loaded(composer, model, quant, batch, context, seed) as fused:
        given = prompt(fused.setup.architecture, batch, context, seed)
        tokens, logits = greedy(fused, given)
        wanted = in_float32(fused, tokens, STEPS)
        setup = plain(fused)
    gc.collect()
    torch.cuda.empty_cache()
    with serving(HfBackend, setup, context + STEPS) as transformers:
        found = fed(transformers, tokens[:, : context + COMPARED], context)
    theirs, ours = (error(one[:, :COMPARED], wanted[:, :COMPARED]) for one in (found, logits))
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
    with loaded(composer, SMALL, "none", batch, context, seed) as fused:
        given = prompt(fused.setup.architecture, batch, context, seed)
        tokens, logits = greedy(fused, given)
        wanted = in_float32(fused, tokens, STEPS)
    assert error(logits, wanted) < 0.03, f"seed {seed}"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("quant", ["none", "int4", "nf4"])
@pytest.mark.parametrize("model", [SMALL, LARGE])
def test_a_step_gives_the_same_bits_each_time(composer: Composer, model: str, quant: str, batch: int) -> None:
    """Captured or not. Kernels that come up early and read what is not there yet would not."""
    seed = torch.seed() % 2**31
    with loaded(composer, model, quant, batch, CONTEXT, seed) as fused:
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


@pytest.mark.parametrize(("model", "quant", "batch"), HELD)
def test_decoding_holds_weights_and_cache_and_little_more(
    composer: Composer, monkeypatch: pytest.MonkeyPatch, model: str, quant: str, batch: int
) -> None:
    """By the figure that a cell's record has, which counts whatever the process holds."""
    cell = composer.cell(
        [f"model={model}", "execution=cuda_graph", f"context={CONTEXT}", f"protocol.batch_size={batch}"]
    )
    monkeypatch.setattr("registry.measure.seen", lambda *_: {})  # a profiler stays in the process
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # those of other tests; a cell's own are counted
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert before < 2**20, f"other tests left {before} bytes, which a cell would not find"
    with loaded(composer, model, quant, batch, CONTEXT, 0) as fused:
        measured = measure(fused, cell.execution, cell.protocol, CONTEXT, lambda _: None)
        weights = sum(storages(fused.weights().values()).values())
        cache = fused.setup.architecture.kv_bytes_per_token() * (CONTEXT + STEPS) * batch
    peak = measured["decode_peak_memory_bytes"]
    assert peak <= MOST * (weights + cache), f"{peak} bytes; weights {weights}, cache {cache}"

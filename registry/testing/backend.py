"""The contract of a decode body."""

from __future__ import annotations

import gc
import itertools
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from registry.api import (
    HEAD,
    AttentionKernel,
    Backend,
    LinearFormat,
    Plugin,
    Refused,
    Setup,
)
from registry.checkpoint import expected_tensors
from registry.execution import Compiled
from registry.plugins import Catalog
from registry.testing.contract import Contract, gpu, skip_without
from registry.testing.tensors import (
    assert_close,
    bytes_beside,
    capture,
    cosine_of,
    new_tensors,
    no_synchronisation,
    storages,
    ulp,
)
from registry.weights import RandomWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn


class BackendContract(Contract):
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
        compiles: Whether to compile a step, which takes seconds: one suite of a plugin is enough.
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
    compiles: ClassVar[bool] = True

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
        skip_without(plugin)
        made: LinearFormat = plugin(plugin.Options())
        return made

    def kernel(self) -> AttentionKernel:
        """The attention kernel, as it comes; skips the test if its package is missing."""
        plugin = Catalog().load("attention", self.attention)
        skip_without(plugin)
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
            quant_options=setup.linear.options,
            attention_options=setup.attention.options,
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

        weights = {name: tensor.float() for name, tensor in backend.dequantized()}
        a = self.architecture  # a format may store a head of its own where the model ties it to the embedding
        a = replace(a, tied_embeddings=a.tied_embeddings and f"{HEAD}.weight" not in weights)
        model = AutoModelForCausalLM.from_config(
            a.transformers_config(), dtype=torch.float32, attn_implementation="eager"
        )
        model = model.to(tokens.device).eval()
        model.load_state_dict(weights, strict=False)
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
                similarity = cosine_of(tensor, given)
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
                held = storages(backend.weights().values())
                stored = storages(tensor for module in made for tensor in linear.stored(module))
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
                similarity = cosine_of(logits[stream, index], want[stream, index])
                assert similarity >= self.cosine, (
                    f"{what}, stream {stream}: cosine with the reference's logits is {similarity:.5f}, "
                    f"less than {self.cosine}"
                )
            best = want.topk(2, -1).values
            noise = self.margin_ulps * ulp(best[..., 0], self.torch_dtype())
            decisive = best[..., 0] - best[..., 1] > noise
            assert decisive.any(), "the reference's best two logits are everywhere within the noise: more steps"
            agree = logits.argmax(-1) == want.argmax(-1)
            wrong = (decisive & ~agree).nonzero().tolist()
            assert not wrong, f"greedy tokens differ from the reference's at (stream, step) {wrong}"

    def test_choice_is_the_first_of_the_largest(self, cache: str, batch_size: int) -> None:
        """As `torch.argmax`: the first of equal logits, zeros of either sign among them, and of what is no number."""
        import torch

        def alike(value: float) -> Callable[[Tensor], object]:
            return lambda logits: logits.fill_(value)

        def two(value: float, other: float, rest: float) -> Callable[[Tensor], object]:
            def fill(logits: Tensor) -> None:
                logits.fill_(rest)
                logits[:, -2], logits[:, -1] = value, other

            return fill

        inf, nan = float("inf"), float("nan")
        cases: dict[str, Callable[[Tensor], object]] = {
            "random logits": lambda logits: logits.normal_(),
            "negative ones": lambda logits: logits.normal_().abs_().neg_(),
            "zeros": alike(0.0),
            "infinitely small ones": alike(-inf),
            "infinitely large ones": alike(inf),
            "two equal ones": two(1.5, 1.5, -2.0),
            "two zeros": two(-0.0, 0.0, -1.0),
            "two zeros, turned": two(0.0, -0.0, -1.0),
            "the last": two(1.0, 2.0, -inf),
            "one that is no number": two(inf, nan, 1.0),
            "one that is no number, its sign set": two(-nan, inf, 1.0),
            "two that are no numbers": two(-nan, nan, 1.0),
        }
        with self.serving(cache, self.hosted()[0], batch_size) as backend:
            token = backend.prefill(self.prompt(batch_size)).argmax(-1)
            logits = backend.decode_step(token).clone()
            for what, fill in cases.items():
                fill(logits)
                token.fill_(-1)
                backend.choose(logits, token)
                want = logits.argmax(-1)
                assert torch.equal(token, want), f"of {what} {token.tolist()} are chosen, not {want.tolist()}"

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
            expected = sum(storages(backend.weights().values()).values()) - unread + rows
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
        with new_tensors() as alive, self.serving(cache, quant) as backend:
            self.decode(backend, 1, steps=2)
            beside = bytes_beside(alive(), backend.weights().values())
            allowed = self.cache_bytes(backend) + self.buffer_bytes
            assert beside <= allowed, (
                f"{beside} bytes are held beside weights(), the cache takes {self.cache_bytes(backend)} "
                f"and buffers may take {self.buffer_bytes}"
            )

    def test_step_can_be_compiled(self) -> None:
        """A compiled step decodes what the eager step does, and does it again after a seek.

        One format, one stream, one layer: a compilation takes seconds, and a cell's own is proven before it is timed.
        """
        if "compile" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare compile")
        if not self.compiles:
            pytest.skip("another suite of the plugin compiles its step")
        cache = "static" if "static" in self.plugin.caches else self.plugin.caches[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "architecture", self.architecture.cut(1))
            with self.serving(cache, self.hosted()[0], execution="compile") as backend, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler's, which are not the plugin's
                tokens, logits = self.decode(backend, 1, self.steps)
                token = tokens[:, self.prompt_tokens]
                compiled = Compiled(backend, token, self.prompt_tokens, self.steps, "default")
                try:
                    compiled.prepare()
                    for visit in ("", " after a seek"):
                        compiled.rewind()
                        for index in range(1, self.steps + 1):
                            what = f"compiled step {index}{visit} does not give the logits of the eager step"
                            assert_close(compiled.launch(), logits[:, index], what, self.cosine, self.relative_error)
                            compiled.feed(logits[:, index].argmax(-1))
                        position = backend.position()
                        assert position == self.capacity, (
                            f"position() is {position} after {self.steps} compiled steps"
                        )
                except Refused as refused:
                    raise AssertionError(f"the step does not compile: {refused}") from refused
                finally:
                    compiled.close()

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
        with new_tensors() as alive:
            with self.serving(cache, quant) as backend:
                self.decode(backend, 1, steps=2)
            left = bytes_beside(alive(), [])
        assert left <= self.buffer_bytes, f"{left} bytes of tensors are alive after close()"
        if self.place() == "cuda":
            left = torch.cuda.memory_allocated() - allocated
            assert left <= 2**20, f"{left} bytes of device memory are allocated after close()"
        del backend

    @gpu
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
            held = storages(backend.weights().values())
            blocks = len(held) + 2 * self.architecture.layers + 64
            allowed = sum(held.values()) + self.cache_bytes(backend) + self.buffer_bytes + 512 * blocks
            assert grown <= allowed, f"{grown} bytes of device memory are held, weights and cache explain {allowed}"

    @gpu
    def test_step_never_waits_for_the_device(self, cache: str, quant: str) -> None:
        """No step synchronises with the host."""
        self.place_on_gpu()
        with self.serving(cache, quant) as backend:
            token = backend.prefill(self.prompt(1)).argmax(-1)
            for _ in range(2):
                token = backend.decode_step(token).argmax(-1)
            with no_synchronisation("decode_step"):
                backend.decode_step(token)

    @gpu
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
                backend.choose(out, token)
                return out

            backend.seek(self.prompt_tokens)
            graph, out = capture(step)
            backend.seek(self.prompt_tokens)
            token.copy_(tokens[:, self.prompt_tokens])
            for index in range(1, self.steps + 1):
                graph.replay()
                what = f"replay {index} does not give the logits of the eager step"
                assert_close(out, logits[:, index], what, self.cosine, self.relative_error)
                if index < self.steps:
                    same = torch.equal(token, tokens[:, self.prompt_tokens + index])
                    assert same, f"replay {index} decodes another token than the eager step"
            position = backend.position()
            assert position == self.capacity, f"position() is {position} after {self.steps} replays"
            graph.reset()

"""The fused step: the contract on its kernels, under Triton's interpreter where there is no GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from int4_kernels import Int4Kernels
from planning import CPU, H200, Plan, refused

from backends.fused.body import FusedBackend
from backends.fused.tiles import PRODUCTS, TABLE, Parts, Tile, Tiles, table
from backends.hf import HfBackend
from backends.int4.kernel.launches import Arguments, Launches
from backends.quant.int4 import Int4
from backends.tiles import Place, Table
from registry.api import LinearFormat
from registry.identity import source_digest
from registry.outcome import Outcome
from registry.synthesis import write_checkpoint
from registry.testing import TINY, BackendContract
from registry.weights import FolderWeights, RandomWeights

# Triton's interpreter turns arrays of one element into numbers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.timeout(900),
]


def row(product: str, **cut: int) -> dict[str, Any]:
    return {"place": {"device": "any", "product": product}, "cut": cut}


WIDE = [row(product, rows=64, columns=128, warps=4) for product in PRODUCTS if product != "qkv"]
WIDE += [row("qkv", rows=32, columns=64, warps=4, depth=3), row("attention", parts=3, rows=4, warps=4)]
"""Few programs, which the interpreter runs one after the other; and more than one tile and part of everything."""


class Anywhere(FusedBackend):
    """The body as it would be if its kernels ran on the CPU, where Triton interprets them."""

    devices = ("cpu", "cuda")

    def tiles(self) -> Tiles:
        return table() if self.setup.device == "cuda" else Tiles(WIDE)


STALE = 2**20 - 2**40
"""A sum of squares that has no root, and a ticket behind any weight's last tile: what no step may start from."""


class Poisoned(Anywhere):
    """Its buffers and cache hold NaNs where nothing was written yet, and its counts are stale."""

    def load(self, capacity: int) -> None:
        import torch

        super().load(capacity)
        self._cache.fill_(torch.nan)
        for name, held in vars(self.step).items():
            if isinstance(held, torch.Tensor) and held.is_floating_point() and name not in ("_keys", "_values"):
                held.fill_(torch.nan)
        self.step._counts.fill_(STALE)


SMALL = replace(TINY, layers=1, hidden=192, q_heads=4, kv_heads=1, head_dim=64, ffn=192, vocab=320)
"""Extents that no tile divides."""


class TestFused(BackendContract):
    plugin = Anywhere
    architecture = SMALL
    formats = ("none",)
    prompt_tokens = 5
    steps = 3
    buffer_bytes = 2**20  # what the parts of the cache find, and every activation of a step


class TestFusedAroundLayers(TestFused):
    """A format's layers between the kernels that do what is left."""

    formats = ("nf4",)


class Packs(Anywhere):
    """The body with its int4 kernels, where they are not compiled."""

    def packs(self) -> bool:
        return True

    def launches(self) -> Launches:
        return super().launches() if self.setup.device == "cuda" else Anyhow([])


class Called(Anywhere):
    """The body that calls int4's layers, wherever it is."""

    def packs(self) -> bool:
        return False


class Anyhow(Launches):
    """What is launched where nothing is."""

    def launch(self, device: str, tiles: int, groups: int, streams: int) -> Arguments:
        return Arguments(0, 0)


class TestFusedInt4(TestFused):
    """Int4 weights with the rest of a block around their products."""

    plugin = Packs
    architecture = replace(SMALL, hidden=128, ffn=256)
    formats = ("int4",)

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        if not torch.cuda.is_available():
            monkeypatch.setattr("backends.int4.kernel.loader.extension", Int4Kernels)

    def test_linear_layers_are_the_formats(self, cache: str, quant: str) -> None:
        """Layers that read the same activations were laid into one weight: the same weights in as many bytes."""
        import torch

        with self.serving(cache, quant) as backend:
            int4, source, a = backend.setup.linear, backend.setup.weights, self.architecture
            held, stored = dict(backend.dequantized()), 0
            for path, (columns, rows) in a.linear_shapes.items():
                name = f"model.layers.0.{path}"
                plain = torch.nn.Linear(columns, rows, bias=False, dtype=self.torch_dtype(), device=self.place())
                plain.weight = torch.nn.Parameter(
                    source.tensor(f"{name}.weight", (rows, columns), *self.where()), False
                )
                layer = int4.convert(plain)
                stored += sum(tensor.nbytes for tensor in int4.stored(layer))
                assert torch.equal(held[f"{name}.weight"], int4.dequantize(layer)), name
            found = {
                name: tensor for name, tensor in backend.weights().items() if "words" in name or "scales" in name
            }
            alone = [tensor for name, tensor in backend.weights().items() if "o_proj" in name or "down_proj" in name]
            assert sum(tensor.nbytes for tensor in [*found.values(), *alone]) == stored

    def where(self) -> tuple[Any, str]:
        return self.torch_dtype(), self.place()


@pytest.mark.parametrize("body", [Packs, Called])
def test_a_folder_s_layers_multiply_in_the_model_s_dtype(
    body: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that reads folders never sees a filled layer, only what the tree says of it."""
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr("backends.int4.kernel.loader.extension", Int4Kernels)
    shape, folder = TestFusedInt4.architecture, tmp_path / "folder"

    class Suite(TestFused):
        plugin, formats, architecture = body, ("int4",), shape

        def setup(self, *given: Any) -> Any:
            return replace(super().setup(*given), weights=FolderWeights(folder))

    suite = Suite()
    with torch.inference_mode():
        write_checkpoint(folder, shape, RandomWeights(0), Int4(Int4.Options()), suite.place(), print)
    suite.test_steps_equal_a_full_forward("static", "int4", 1)


class TestFusedAroundInt4(TestFused):
    """The same format's layers, called."""

    plugin = Called
    architecture = replace(SMALL, hidden=128, ffn=256)
    formats = ("int4",)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("body", [Packs, Called, HfBackend])
def test_a_head_of_four_bits(body: Any, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr("backends.int4.kernel.loader.extension", Int4Kernels)

    class Suite(TestFusedAroundInt4):
        plugin = body
        architecture = replace(TestFusedInt4.architecture, tied_embeddings=tied)

        def linear(self, quant: str) -> Any:
            return Int4(Int4.Options(head_bits=4))

    suite, a = Suite(), Suite.architecture
    suite.test_steps_equal_a_full_forward("static", "int4", 1)
    with suite.serving("static", "int4") as backend:
        head = dict(backend.dequantized())["lm_head.weight"]
        embedding = a.vocab * a.hidden * 2
        packed = a.vocab * a.hidden // 2 + a.vocab * a.hidden // 128 * 2
        blocks = sum(rows * columns // 2 + rows * columns // 64 for columns, rows in a.linear_shapes.values())
        small = (a.q_heads + 2 * a.kv_heads) * a.head_dim * 2 + 3 * a.hidden * 2  # biases and norms
        assert head.shape == (a.vocab, a.hidden)
        assert backend.bytes_per_step(0.0).weights == blocks + packed + small + a.hidden * 2
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in backend.weights().values()}
        assert sum(held.values()) == blocks + packed + small + embedding


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA = replace(SMALL, model_type="llama", qkv_bias=False)
OTHERS = {
    "three blocks, two groups of seven": replace(SMALL, layers=3, hidden=160, q_heads=14, kv_heads=2),
    "a group of one": replace(SMALL, q_heads=2, kv_heads=2),
    "a group of eight, no bias": replace(SMALL, model_type="mistral", q_heads=8, qkv_bias=False),
    "wide heads, a tied embedding": replace(SMALL, q_heads=4, head_dim=128, tied_embeddings=True),
    "Llama 3's rotary positions": replace(LLAMA, rope_scaling=LLAMA3),
    "YaRN's rotary positions": replace(LLAMA, rope_scaling=YARN),
    "rotary positions that are divided": replace(LLAMA, rope_scaling=LINEAR),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_shapes(what: str) -> None:
    suite = type("Suite", (TestFused,), {"architecture": OTHERS[what]})
    suite().test_steps_equal_a_full_forward("static", "none", 2)


class Narrow(Anywhere):
    """Parts of the cache that take several tiles, as those of a long text do."""

    def tiles(self) -> Tiles:
        others = [one for one in WIDE if one["place"]["product"] != "attention"]
        return Tiles([*others, row("attention", parts=2, rows=2, warps=4)])


def test_a_part_of_several_tiles() -> None:
    suite = type("Suite", (TestFused,), {"plugin": Narrow, "prompt_tokens": 13, "steps": 2})
    suite().test_steps_equal_a_full_forward("static", "none", 2)


def test_a_choice_among_several_parts() -> None:
    suite = type("Suite", (TestFused,), {"architecture": replace(SMALL, vocab=2500)})
    suite().test_choice_is_the_first_of_the_largest("static", 3)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_norms_epsilon(quant: str) -> None:
    """As large as the squares, for a usual one is lost in them."""
    suite = type("Suite", (TestFused,), {"architecture": replace(SMALL, rms_norm_eps=0.5), "formats": (quant,)})
    suite().test_steps_equal_a_full_forward("static", quant, 1)


def test_a_prompt_s_logits_are_its_last_position_s_alone() -> None:
    """151936 numbers a position are more than all activations of a block."""
    suite, seen = TestFused(), []
    with suite.serving("static", "none", 2) as backend:
        backend.model["lm_head"].register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)))
        backend.prefill(suite.prompt(2))
    [(given, out)] = seen
    assert (given.numel(), out.numel()) == (2 * SMALL.hidden, 2 * SMALL.vocab)


class ProductOfItsOwn(LinearFormat):
    """A stranger's, whose layer is the `nn.Linear` that it was given, its product another."""

    executions = ("eager", "cuda_graph")

    def convert(self, linear: Any) -> Any:
        """See `LinearFormat.convert`."""
        import torch

        self.calls = 0

        def forward(x: Any) -> Any:
            self.calls += 1
            return torch.nn.functional.linear(x, linear.weight, linear.bias)

        linear.forward = forward
        return linear

    def dequantize(self, module: Any) -> Any:
        """See `LinearFormat.dequantize`."""
        return module.weight.data


def test_a_stranger_s_layer_is_called_also_where_it_is_plain() -> None:
    """A step that multiplied its weights by itself would be measured under the stranger's name."""
    stranger = ProductOfItsOwn(ProductOfItsOwn.Options())
    suite = type("Suite", (TestFused,), {"linear": lambda _self, _quant: stranger})()
    with suite.serving("static", "none", 1) as backend:
        token = backend.prefill(suite.prompt(1)).argmax(-1)
        stranger.calls = 0
        backend.decode_step(token)
        assert stranger.calls == len(SMALL.linear_shapes)


PACKED = TestFusedInt4.architecture
OTHERS_PACKED = {
    "a group of seven, an odd number of groups of columns": replace(PACKED, hidden=384, q_heads=14, kv_heads=2),
    "two blocks, a group of one": replace(PACKED, layers=2, q_heads=2, kv_heads=2),
    "a group of eight, no bias": replace(PACKED, model_type="mistral", q_heads=8, qkv_bias=False),
    "wide heads, an inner layer of many groups": replace(PACKED, head_dim=128, ffn=128 * 19),
}
"""Of int4, whose columns come in groups of 128."""


@pytest.mark.parametrize("what", OTHERS_PACKED)
def test_other_shapes_of_int4(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr("backends.int4.kernel.loader.extension", Int4Kernels)
    kind = {"plugin": Packs, "formats": ("int4",), "architecture": OTHERS_PACKED[what]}
    suite = type("Suite", (TestFused,), kind)
    suite().test_steps_equal_a_full_forward("static", "int4", 2)


@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_gptqmodel_s_layers(quant: str) -> None:
    """Layers that are neither torch's nor ours, with a bias of their own, which some kernels permute."""
    kind = {"formats": (quant,), "architecture": replace(SMALL, hidden=128, ffn=256)}
    suite = type("Suite", (TestFused,), kind)()
    suite.test_steps_equal_a_full_forward("static", quant, 2)
    suite.test_weight_bytes_are_the_tensors_held("static", quant, 2)


class PoisonedInt4(Poisoned, Packs):
    """The same, with its int4 kernels."""


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize(
    ("quant", "body", "streams"),
    [
        ("none", Poisoned, 1),
        ("none", Poisoned, 3),
        ("nf4", Poisoned, 1),
        ("int4", PoisonedInt4, 1),
        ("int4", PoisonedInt4, 3),
    ],
)
def test_nothing_is_read_that_was_not_written(
    quant: str, body: Any, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers, the unused rows of the cache and whatever is allocated hold NaNs before the first step."""
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr("backends.int4.kernel.loader.extension", Int4Kernels)
    shape = TestFusedInt4.architecture
    suite = type("Suite", (TestFused,), {"plugin": body, "formats": (quant,), "architecture": shape})
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty gives with NaNs
    try:
        assert torch.empty(8).isnan().all()
        suite().test_steps_equal_a_full_forward("static", quant, streams)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_stranger_s_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example plugin's layers and its kernel, which know nothing of this body."""
    monkeypatch.syspath_prepend(Path(__file__).with_name("plugin_example"))
    from rfloor_example.int8 import MOST_ROWS, Int8Rowwise

    class Interpreted(Int8Rowwise):
        def takes(self, x: Any) -> bool:
            return x.numel() <= MOST_ROWS * x.shape[-1]

    class Suite(TestFused):
        formats = ("int8-rowwise",)
        steps = 1

        def linear(self, quant: str) -> Any:
            return Interpreted(Interpreted.Options())

    Suite().test_steps_equal_a_full_forward("static", "int8-rowwise", 2)


def test_a_prompt_of_every_part() -> None:
    """Fewer rows than parts, as many, and some more: an empty part has no weight."""
    for tokens in (1, 3, 7):
        suite = type("Suite", (TestFused,), {"prompt_tokens": tokens, "steps": 1})
        suite().test_steps_equal_a_full_forward("static", "none", 1)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model=tiny"], "heads of 32; it takes 64, 128"),
        (["model.q_heads=6", "model.kv_heads=2"], "query heads a key head: 3; it takes 1, 4, 7, 8"),
        (["protocol.batch_size=5"], "streams: 5; it takes 1, 2, 3, 4"),
        (
            ["model=llama-3.1-8b", "model.rope_scaling={rope_type: dynamic, factor: 2.0}"],
            "rotary positions of type dynamic; it takes default, linear, llama3, yarn",
        ),
        (["attention=sdpa-math"], "pins another"),
        (["attention=flashinfer"], "does not host attention=flashinfer"),
        (["execution=compile"], "cannot be launched by execution=compile"),
        (["execution.cache=dynamic"], "works on a static cache"),
    ],
)
def test_what_it_does_not_take_is_refused_before_anything_loads(
    plan: Plan, overrides: list[str], reason: str
) -> None:
    refusal = refused(plan("backend=fused", *overrides), Outcome.UNSUPPORTED)
    assert reason in refusal.reason


def test_it_runs_on_cuda_alone(plan: Plan) -> None:
    assert "runs on cuda" in refused(plan("backend=fused", device=CPU), Outcome.UNSUPPORTED).reason


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_study_s_models_are_taken(plan: Plan, model: str, batch: int) -> None:
    shape = (f"model={model}", f"protocol.batch_size={batch}", "context=16384")
    for execution in ("eager", "cuda_graph"):
        cell = plan("backend=fused", f"execution={execution}", *shape, device=H200)
        assert cell.refusal is None or cell.refusal.outcome is Outcome.MISSING_DEPENDENCY
        assert cell.config.execution.cache == "static"


def test_eager_keeps_its_growing_cache_in_other_bodies(plan: Plan) -> None:
    assert plan("backend=hf").config.execution.cache == "dynamic"


NEAR = Tile(2, 1024, 4)


def test_the_nearest_tile_holds() -> None:
    known = Tiles([row(product, rows=8, columns=2048, warps=8) for product in PRODUCTS])
    assert known.tile(Place("a GPU", "out", 64, 4096, 1), 64) == Tile(8, 2048, 8)
    known.set(Place("a GPU", "out"), Tile(4, 1024, 4))
    known.set(Place("a GPU", "out", 64, 4096), NEAR)
    assert known.tile(Place("a GPU", "out", 64, 4096, 1), 64) == NEAR
    assert known.tile(Place("a GPU", "out", 64, 2048, 1), 64) == Tile(4, 1024, 4)
    assert known.tile(Place("another", "out", 64, 4096, 1), 64) == Tile(8, 2048, 8)
    assert Tiles(known.known()).tile(Place("a GPU", "out", 64, 4096, 1), 64) == NEAR


def test_streams_may_have_a_tile_of_their_own() -> None:
    known = Tiles([row("out", rows=8, columns=2048, warps=8)])
    known.set(Place("a GPU", "out", 64, 4096), NEAR)
    known.set(Place("a GPU", "out", 64, 4096, 4), Tile(4, 1024, 4))
    assert known.tile(Place("a GPU", "out", 64, 4096, 1), 64) == NEAR
    assert known.tile(Place("a GPU", "out", 64, 4096, 4), 64) == Tile(4, 1024, 4)


def test_a_tile_divides_the_rows_and_is_no_larger_than_they_are() -> None:
    known = Tiles([row("out", rows=8, columns=2048, warps=8)])
    assert known.tile(Place("a GPU", "out", 40, 300, 1), 20) == Tile(4, 512, 2, depth=1)
    assert known.tile(Place("a GPU", "out", 40, 100, 1), 20) == Tile(4, 128, 1, depth=1)
    assert known.tile(Place("a GPU", "out", 40, 2049, 1), 20) == Tile(4, 2048, 8, depth=2)


def test_parts_are_those_of_the_nearest_length_and_may_all_have_rows() -> None:
    known = Tiles([row("attention", parts=33, rows=64, warps=4)])
    assert known.parts("a GPU", 2083, 4) == Parts(33, 64, 4)
    assert known.parts("a GPU", 100, 4) == Parts(2, 64, 4)
    known.set(Place("a GPU", "attention", 2083, 4), Parts(22, 32, 4))
    known.set(Place("a GPU", "attention", 16419, 4), Parts(66, 64, 4))
    assert known.parts("a GPU", 4131, 4) == Parts(22, 32, 4)
    assert known.parts("a GPU", 8227, 4) == Parts(66, 64, 4)
    assert known.parts("a GPU", 2083, 8) == Parts(33, 64, 4), "of other heads nothing is known"


def test_rfloor_s_own_table_has_a_tile_for_everything() -> None:
    for product in PRODUCTS:
        table().tile(Place("no such GPU", product, 4096, 4096, 1), 64)
    table().parts("no such GPU", 2083, 8)


def test_a_table_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.yaml"
    path.write_text("# What it is for.\n")
    known = Tiles([row("out", rows=8, columns=2048, warps=8)])
    known.set(Place("NVIDIA H200", "out", 64, 4096), Tile(4, 512, 2, depth=3))
    known.write(path)
    assert path.read_text().startswith("# What it is for.\n- ")
    assert Tiles.read(path).known() == known.known()
    Table.read(path).write(path)
    assert Tiles.read(path).tile(Place("NVIDIA H200", "out", 64, 4096, 1), 64) == Tile(4, 512, 2, depth=3)


def test_another_table_of_tiles_is_another_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tabled"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for rows in (1, 2):
        (package / "tiles.yaml").write_text(f"- rows: {rows}")
        source_digest.cache_clear()
        found.add(source_digest("tabled", FusedBackend.data))
    assert len(found) == 2
    assert TABLE.name in FusedBackend.data

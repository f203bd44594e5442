"""What benches of the fused step measure, as far as it can be told without a GPU."""

import argparse
import dataclasses
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_fused

from backends.fused.tiles import PRODUCTS, Tiles
from backends.int4.kernel.launches import Launches
from backends.tiles import Place, Table
from registry.architecture import Architecture
from registry.compiling import Compilations
from registry.compose import Composer
from registry.plugins import Catalog

# As tests/test_fused.py has it, of Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files import each other as they lie in their folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")


# gpt-fast's recipe


def test_the_recipe_s_angles_are_exact_at_long_positions(architecture: Architecture) -> None:
    import torch
    from gpt_fast_recipe import Decoder

    before, capacity = torch.get_default_dtype(), 4099
    torch.set_default_dtype(torch.bfloat16)
    try:
        decoder: Any = Decoder(architecture, capacity)
    finally:
        torch.set_default_dtype(before)
    width = architecture.head_dim
    for position in (1, 257, capacity - 1):
        angles = [position * architecture.rope_theta ** (-2 * pair / width) for pair in range(width // 2)]
        for found, of in ((decoder.cos, math.cos), (decoder.sin, math.sin)):
            assert found.dtype is torch.bfloat16
            assert found[position].tolist() == pytest.approx([of(angle) for angle in angles * 2], abs=0.01)


DONE = Compilations(frames=1, graphs=1, from_cache=0, breaks=Counter(), skips=0, recorded=2)


@pytest.mark.parametrize(
    ("change", "graphs", "told"),
    [
        ({}, True, ""),
        ({"skips": 1, "recorded": 0}, False, ""),
        ({"skips": 1}, True, "1 skipped"),
        ({"recorded": 0}, True, "0 inputs recorded"),
    ],
)
def test_the_recipe_is_refused_without_the_graphs_that_it_is_named_for(
    change: dict[str, int], graphs: bool, told: str
) -> None:
    from gpt_fast_recipe import check

    done = dataclasses.replace(DONE, **change)
    if told:
        with pytest.raises(SystemExit, match=told):
            check(done, done, graphs)
    else:
        check(done, done, graphs)


def test_the_recipe_is_refused_if_steps_hold_the_compiler_s_time() -> None:
    from gpt_fast_recipe import check

    with pytest.raises(SystemExit, match="while steps were timed"):
        check(DONE, dataclasses.replace(DONE, frames=2), graphs=False)


# The tuner


MODELS = [name for name in Composer(Catalog()).options("model") if name != "tiny"]
"""Of conf/; the fused step does not take the last one's heads."""
CONTEXT = 2048


@pytest.fixture
def shape(composer: Composer, model: str) -> Architecture:
    return Architecture.of(composer.cell([f"model={model}"]).model)


class Asked(Table):
    """Remembers which places were looked up."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.places: list[Place] = []

    def find(self, place: Place) -> dict[str, Any] | None:
        self.places.append(place)
        return super().find(place)

    def nearest(self, place: Place) -> dict[str, Any] | None:
        self.places.append(place)
        return super().nearest(place)


class AskedTiles(Asked, Tiles):
    pass


class AskedLaunches(Asked, Launches):
    pass


def arguments(**given: Any) -> argparse.Namespace:
    known = {"quant": "none", "context": CONTEXT, "only": (*PRODUCTS, "attention")}
    return argparse.Namespace(**(known | given))


def step(a: Architecture, batch: int, known: Tiles, launched: Launches) -> Any:
    """A step of these extents without a tensor behind them."""
    import torch
    from replays import ROOM

    from backends.fused.step import Step

    shape = (a.layers, batch, a.kv_heads, CONTEXT + ROOM, a.head_dim)
    keys = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    weights: Any = None
    return Step(a, weights, keys, keys, known, launched)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_tuned_is_what_a_step_takes(shape: Architecture, batch: int) -> None:
    """Every product has candidates, each is cut as it says, and the places are those that the step looks up."""
    from fused_tiles import questions, tables

    known = AskedTiles(tables()[0].known())
    asked = questions(arguments(batch=batch), shape, "meta", known, Launches([]))
    step(shape, batch, known, Launches([]))
    assert {one.place for one in asked} == set(known.places)
    *products, attention = asked
    assert [one.place.product for one in asked] == [*PRODUCTS, "attention"]
    assert all(one.cuts for one in asked)
    for number in range(max(len(one.cuts) for one in products)):
        for one in products:
            known.set(one.place, one.cuts[number % len(one.cuts)])
        made = step(shape, batch, known, Launches([]))
        assert made._tiles == {one.place.product: one.cuts[number % len(one.cuts)] for one in products}
    for cut in attention.cuts:
        known.set(attention.place, cut)
        made = step(shape, batch, known, Launches([]))
        assert (made._parts.rows, made._parts.warps) == (cut.rows, cut.warps)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_launches_that_are_tuned_are_those_that_a_step_takes(
    shape: Architecture, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a number of streams: one tuned for four leaves one stream's row as it was."""
    import torch
    from fused_tiles import questions

    from backends.int4.layout import GROUP, ROWS

    monkeypatch.setattr("backends.int4.kernel.launches._device", lambda _: ("meta", 132))
    launched = AskedLaunches([])
    asked = questions(arguments(quant="int4-head4", batch=batch), shape, "meta", Tiles([]), launched)
    products = [one for one in asked if one.place.product not in (*PRODUCTS, "attention")]
    assert len(products) == len(PRODUCTS)
    for one in products:
        launched.set(one.place, one.cuts[0])
        words = torch.empty(one.place.rows // ROWS, one.place.columns // GROUP, device="meta")
        found = step(shape, batch, Tiles(test_fused.WIDE), launched)._launch(SimpleNamespace(words=words))
        assert found == (one.cuts[0].warps, one.cuts[0].blocks * 132)
    assert {one.place for one in products} <= set(launched.places)
    assert {one.place.streams for one in products} == {batch}


# Where a step goes


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # no sum of squares is left
@pytest.mark.parametrize(
    ("quant", "body"),
    [
        ("none", test_fused.Anywhere),
        ("int4", test_fused.Packs),
        ("int4", test_fused.Called),
        ("nf4", test_fused.Anywhere),
    ],
)
def test_a_kind_of_launch_is_left_out_and_no_other(quant: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from chain import LAYERS, OVERWRITTEN, OWN, Chain

    from backends.fused.step import Step

    if not torch.cuda.is_available():
        monkeypatch.setattr("backends.int4.kernel.loader.extension", test_fused.Int4Kernels)
    shape = dataclasses.replace(test_fused.TestFusedInt4.architecture, layers=2)
    suite = type("Suite", (test_fused.TestFused,), {"plugin": body, "formats": (quant,), "architecture": shape})()
    calls: Counter[str] = Counter()

    def counted(name: str, method: Any) -> Any:
        def call(*given: Any) -> Any:
            calls[given[1] if name == "_residual" else name] += 1
            return method(*given)

        return call

    for name in (*OWN.values(), "_residual"):
        monkeypatch.setattr(Step, name, counted(name, getattr(Step, name)))
    with suite.serving("static", quant) as backend:
        tokens = suite.prompt(1)
        backend.prefill(tokens)
        chain, position = Chain(backend), tokens.shape[1]
        for block in backend._weights.blocks if chain.hosted else ():
            for name in LAYERS:
                getattr(block, name).register_forward_hook(lambda *_, name=name: calls.update([name]))

        def stepped() -> Any:
            calls.clear()
            chain.begin(position)
            return backend.decode_step(tokens[:, -1]).clone()

        want, whole = stepped(), dict(calls)
        assert len(whole) == len(chain.kinds)
        for kind in chain.kinds:
            with chain.without(kind):
                first = stepped()
                left = {name: count for name, count in whole.items() if name not in (kind, OWN.get(kind))}
                assert calls == left, kind
                if chain.hosted and kind in OVERWRITTEN:
                    assert torch.equal(first, stepped()), "what the step writes into is as it was"
        assert torch.equal(want, stepped())
        assert calls == whole
        a, read = backend.setup.architecture, sum(chain.bytes_of(k, 0) for k in chain.kinds)
        norms, row = (2 * a.layers + 1) * a.hidden * 2, a.hidden * 2
        assert read == backend.bytes_per_step(0.0).weights - norms - row
        assert chain.bytes_of("attention", position) == backend.bytes_per_step(position).kv

"""What benches of the fused step measure, as far as it can be told without a GPU."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from registry.architecture import Architecture
from registry.compiling import Compilations


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

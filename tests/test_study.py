"""What the study states, and which of ours stands beside it."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from sweeps import ROOT

from registry.compose import Composer

STATED: dict[str, list[tuple[str, Sequence[object]]]] = {
    "matrix": [
        ("4.3: R_floor by GPU, least, median and greatest", [0.190, 0.260, 0.310, 0.192, 0.275, 0.415]),
        ("4.3", [0.340, 0.516, 0.723, 0.354, 0.694, 0.810]),
        ("abstract: the headline cell's, H100 and L4", [0.27, 0.81]),
        ("8 and the companion page: bf16 steps", [16.97, 63.0, 63.15]),
        ("3.3: Mistral on the L4 at 8192", [0.478]),
    ],
    "graphs_ab": [
        ("5: H100, ten sessions", [14.83, 11.78, 3.05, 0.206, 1.259, 1.253, 1.267, 1.245, 1.288, 0.009, 0.002]),
        ("5: eager steps in other rigs", [20.63, 27.28]),
        ("5: L4", [64.48, 62.50, 1.028]),
        ("3.3: Qwen on the L4 at 8192", [87.74, 23.24]),
    ],
    "batch4": [
        ("5: H100, batch 4", [1.110, 1.036, 14.75, 11.78]),
        ("5: batch 4 over batch 1", [1.25, 3.20]),
        ("5: L4 at every context", ["oom"]),
    ],
    "stack": [
        ("2: sdpa and FlashAttention-2, eager", [17.07, 24.16]),
        ("6: sdpa, eager and in a graph", [0.268, 0.383, 1.43, 28.44]),
        ("appendix C: four cells", ["crash"] * 4),
    ],
    "attention": [
        ("6: us a layer", [36.05, 44.35, 48.20, 79.25, 177.55]),
        ("6: ms of 32 layers", [1.15, 5.68]),
        ("6: cuDNN refuses the shape", ["unsupported"]),
    ],
    "quant": [
        ("7: ms a step on the L4", [62.32, 59.36, 45.24, 17.36]),
        ("7", [6.96, 13.09, 0.754, 0.289, 3.59, 1.38, 0.82]),
    ],
    "profile": [
        ("8: profiled and clean, and their ratio", [54.38, 16.97, 3.2, 63.67, 63.0, 1.01]),
        ("8", [0.269, 0.794, 0.75, 0.35]),
        ("appendix D: kernels a block and a step", [10, 283, 323, 323]),
    ],
    "cost": [("companion page", [11.45, 1.45, 7.9]), ("7: roughly", [6])],
}
"""What arXiv 2605.30571 and its companion page state of each experiment's cells, and in which section."""


@pytest.mark.parametrize("name", STATED)
def test_what_the_study_states_stands_beside_the_experiment(composer: Composer, name: str) -> None:
    figures = composer.cell([f"experiment={name}"]).experiment.study
    there: list[object] = [figure.outcome or figure.value for figure in figures]
    for where, numbers in STATED[name]:
        for number in numbers:
            assert number in there, f"{number}, section {where}"
            if isinstance(number, str):
                there.remove(number)


def test_a_configuration_is_checked_without_numpy() -> None:
    look = "import sys, registry.validate; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=False).returncode == 0

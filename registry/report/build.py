"""From an experiment, what was registered of it and its runs to a report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from registry.registration import FIXED
from registry.report.attention import attention
from registry.report.bandwidth import bandwidth
from registry.report.batches import batches
from registry.report.cost import cost
from registry.report.document import Report, markdown
from registry.report.facts import facts
from registry.report.matrix import matrix
from registry.report.observation import latest, pairs
from registry.report.page import html
from registry.report.paired import paired
from registry.report.pieces import not_measured, weakened
from registry.report.prices import prices as priced
from registry.report.profiles import profiles
from registry.report.steps import steps
from registry.report.study import study
from registry.report.variants import variants
from registry.report.verdicts import verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from registry.registration import Logged, Registration
    from registry.report.document import Section
    from registry.report.observation import Observation, Pair
    from registry.schema import ExperimentConfig

    Maker = Callable[[Sequence[Observation], Sequence[Pair], ExperimentConfig, Mapping[str, float]], list[Section]]

SECTIONS: dict[str, Maker] = {
    "attention": lambda runs, *_: attention(runs),
    "bandwidth": lambda runs, *_: bandwidth(runs),
    "batches": lambda runs, *_: batches(runs),
    "cost": lambda runs, _, __, prices: cost(runs, prices),
    "matrix": lambda runs, *_: matrix(runs),
    "pairs": lambda _, found, experiment, __: paired(found, experiment),
    "variants": lambda runs, _, __, prices: variants(runs, prices),
    "profiles": lambda runs, *_: profiles(runs),
    "study": study,
    "steps": lambda runs, *_: steps(runs),
}
"""What an experiment's `report` may name."""
OF_STEPS = ("bandwidth", "batches", "matrix", "pairs", "variants", "profiles")
"""Sections on decode steps alone, which have no use for an attention kernel's calls."""
PAGE, MARKDOWN = "report.html", "report.md"


def build(
    experiment: ExperimentConfig,
    observations: Sequence[Observation],
    registrations: Sequence[Registration] = (),
    prices: Mapping[str, float] | None = None,
    logged: Mapping[str, Logged] | None = None,
) -> Report:
    """Tell of an experiment.

    Args:
        experiment: Names the sections.
        observations: Its runs; of several attempts at a cell in a session the last one counts.
        registrations: Of the sweeps that these belong to; their thresholds decide, not those that the configuration
            has now.
        prices: Dollars an hour by GPU profile, over those of the records.
        logged: Where MLflow has these registrations, by their records.
    """
    observations, today = latest(observations), experiment
    if claimed := [one for one in registrations if one.experiment.claims]:
        # What was registered last is what is paired and drawn; each sweep is judged by its own registration.
        experiment = _as_registered(experiment, max(claimed, key=lambda one: one.registered_at).experiment)
    steps_alone = [one for one in observations if one.record.kind == "step"]
    found, hourly = pairs(steps_alone, experiment), priced(observations, prices or {})
    report = Report(experiment.name, experiment.question, facts(observations))
    for name in experiment.report:
        if name not in OF_STEPS:
            report.sections += SECTIONS[name](observations, found, experiment, hourly)
        elif steps_alone:
            report.sections += SECTIONS[name](steps_alone, found, experiment, hourly)
    if experiment.cells:  # one without cells of its own tells of all that was ever run
        report.sections += not_measured(observations)
    report.sections += weakened([one for _, one in report.numbered().values()])
    if left := len(observations) - len(steps_alone):
        names = [name for name in experiment.report if name in OF_STEPS]
        report.facts += [f"left out of {', '.join(names)}: {left} runs of attention kernels alone"] if names else []
    report.verdicts = verdicts(steps_alone, registrations, today, logged or {})
    return report


def _as_registered(today: ExperimentConfig, then: ExperimentConfig) -> ExperimentConfig:
    """An experiment as it is told today, with the arms and the thresholds of a registration."""
    return dataclasses.replace(today, **{key: getattr(then, key) for key in FIXED})


def write(report: Report, folder: Path) -> list[Path]:
    """Write the Markdown and the page and return their files; what keeps the page from being drawn is told in both.

    A machine that only measures may lack Plotly; its records are reported on elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    try:
        texts[PAGE] = html(report)
    except ImportError as error:
        report.facts.append(f"no page was drawn here: {error}; pip install plotly, then rfloor report {report.title}")
    texts[MARKDOWN] = markdown(report)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]

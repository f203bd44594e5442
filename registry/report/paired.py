"""Two arms, session by session, and the verdicts on what was claimed of them: the study's section 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry import stats
from registry.experiments import applies, matches
from registry.report.document import Row, Section, Table
from registry.report.labels import counted, number, percent
from registry.report.observation import TPOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.report.observation import Measured, Pair
    from registry.schema import ClaimConfig, ExperimentConfig


@dataclass(frozen=True)
class Judged:
    """A claim and what the sessions say of it.

    Attributes:
        claim: As it was registered.
        pair: The block that it speaks of.
        verdict: By Student's interval.
    """

    claim: ClaimConfig
    pair: Pair
    verdict: stats.Verdict

    def __str__(self) -> str:
        found = self.pair.comparison
        told = f"mean speedup {found.mean:.3f}, {_interval(found.student)} at {counted(len(found.ratios), 'session')}"
        return (
            f"{self.verdict.value}: {self.claim.claim} ({block(self.pair)}; {told}; killed if the mean is "
            f"{self.claim.killed_if} {self.claim.speedup:g})"
        )


def judged(pairs: Sequence[Pair], experiment: ExperimentConfig, only: ClaimConfig | None = None) -> list[Judged]:
    """Every claim that is made of a pair's GPU and block, or one alone, with its verdict."""
    return [
        Judged(claim, pair, stats.judge(pair.comparison.student, claim.killed_if, claim.speedup))
        for claim in ([only] if only else experiment.claims)
        for pair in pairs
        if applies(claim, pair.config["gpu"]["peak_bandwidth_gbs"]) and matches(pair.config, claim.where)
    ]


def block(pair: Pair) -> str:
    """A block in a few words."""
    return pair.label


def paired(found: Sequence[Pair], experiment: ExperimentConfig) -> list[Section]:
    """Each block's arms, their ratio with both intervals, and the sessions one by one."""
    one, other = experiment.baseline, experiment.candidate
    summary = Table(
        ["block", "sessions", f"{one} ms", "within", "across", f"{other} ms", "within", "across", "difference ms",
         "speedup", "t 95 %", "bootstrap 95 %", "across"],
        [_summary(pair) for pair in found],
        spare=("within", "across", "bootstrap 95 %", "difference ms"),
    )  # fmt: skip
    pooled = len({run.record.sweep_id for pair in found for run in pair.baseline.ok}) > 1
    sessions = Table(
        ["block", *(["sweep"] if pooled else []), "session", f"{one} ms", f"{other} ms", "speedup"],
        [row for pair in found for row in _sessions(pair, pooled)],
        text_columns=3 if pooled else 2,
    )
    text = [
        f"A session measures both arms back to back in fresh processes, in random order. Milliseconds are means over "
        f"the sessions of each one's median step time; the speedup is the mean over the sessions of {one} / {other}. "
        f"The t interval is Student's, on which verdicts rest; the bootstrap's is the study's, percentiles of "
        f"{stats.RESAMPLES} resampled means, which covers about 90 % at ten sessions. within and across are "
        f"coefficients of variation of the steps in a session and of the sessions' medians.",
    ]
    return [
        Section(f"{one} against {other}", text, [summary], lambda: _plots(found, experiment), True),
        Section("Sessions", (), [sessions]),
    ]


def _summary(pair: Pair) -> Row:
    found = pair.comparison
    cells = [block(pair), str(len(found.ratios)), *_arm(pair.baseline), *_arm(pair.candidate)]
    cells += [number(pair.difference_ms, 3), number(found.mean, 4)]
    cells += [_interval(found.student), _interval(found.bootstrap), percent(found.cv)]
    return Row(cells, [*pair.baseline.ok, *pair.candidate.ok])


def _arm(arm: Measured) -> list[str]:
    return [number(arm.mean(TPOT), 3), percent(arm.spread.within), percent(arm.spread.across)]


def _interval(interval: stats.Interval | None) -> str:
    return "no interval" if interval is None else f"[{interval.low:.4f}, {interval.high:.4f}]"


def _sessions(pair: Pair, pooled: bool) -> list[Row]:
    """A row a session, under the number that its records bear."""
    rows = []
    for index, (one, other) in enumerate(zip(pair.baseline.ok, pair.candidate.ok, strict=True)):
        times = one.record.metrics[TPOT], other.record.metrics[TPOT]
        ratio = pair.comparison.ratios[index]
        session = [*([one.record.sweep_id] if pooled else []), str(one.record.session)]
        cells = [block(pair), *session, *(number(time, 3) for time in times), number(ratio, 4)]
        rows.append(Row(cells, [one, other]))
    return rows


def _plots(found: Sequence[Pair], experiment: ExperimentConfig) -> list[Any]:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figures = []
    for pair in found:
        arms = [(experiment.baseline, pair.baseline), (experiment.candidate, pair.candidate)]
        figure = make_subplots(1, 2, subplot_titles=("step time of each session, ms", "speedup of each session"))
        times = [arm.values(TPOT) for _, arm in arms]
        runs = [*zip(pair.baseline.ok, pair.candidate.ok, strict=True)]
        for both, one, other in zip(runs, *times, strict=True):
            line = {"x": [name for name, _ in arms], "y": [one, other], "mode": "lines+markers"}
            traces = [f"session {run.record.session}, run {run.trace}" for run in both]
            figure.add_trace(go.Scatter(line, hovertext=traces, line={"color": "#3465a4", "width": 1}), 1, 1)
        ratios = pair.comparison.ratios
        figure.add_trace(
            go.Scatter(
                x=[*range(len(ratios))],
                y=ratios,
                mode="markers",
                marker={"color": "#3465a4"},
                hovertext=[f"run {one.trace} over run {other.trace}" for one, other in runs],
            ),
            1,
            2,
        )
        if interval := pair.comparison.student:
            figure.add_hrect(
                interval.low, interval.high, fillcolor="#3465a4", opacity=0.15, line_width=0, row=1, col=2
            )
        figure.add_hline(pair.comparison.mean, line={"color": "#3465a4", "width": 1}, row=1, col=2)
        for one_claim in judged([pair], experiment):
            figure.add_hline(
                one_claim.claim.speedup,
                line={"color": "#cc0000", "dash": "dot"},
                annotation_text=f"killed {one_claim.claim.killed_if} {one_claim.claim.speedup:g}",
                annotation_position="right",
                row=1,
                col=2,
            )
        figure.update_yaxes(rangemode="tozero", row=1, col=1)
        numbers = [str(run.record.session) for run in pair.baseline.ok]
        figure.update_xaxes(title="session", tickvals=[*range(len(ratios))], ticktext=numbers, row=1, col=2)
        figure.update_layout(title=block(pair), showlegend=False, height=400, margin={"r": 150})
        figures.append(figure)
    return figures

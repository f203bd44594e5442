"""Reports out of made-up runs, whose every figure is known."""

import dataclasses
import html.parser
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_profile import ONE_PROFILE
from test_record import made_up_record

from registry import registration
from registry.compose import Composer
from registry.export import export
from registry.outcome import Outcome
from registry.plan import Cell
from registry.report.build import build, write
from registry.report.document import Report, Row, Section, Table, markdown
from registry.report.observation import Observation, cells, pairs
from registry.report.page import html as page
from registry.report.paired import judged
from registry.report.terminal import tell_report
from registry.schema import ExperimentConfig, what_is_measured

EAGER = (14.0, 15.0, 14.5)
GRAPHED = (11.0, 12.0, 11.6)


def run(cell: Cell, number: int, tpot: float = 10.0, **changes: Any) -> Observation:
    """A run whose three steps have the median `tpot`."""
    record = made_up_record(
        cell, record_id=f"record{number}", index=number, started_at=f"2026-07-01T10:{number:02}:00+00:00"
    )
    record.cell_id = cell.cell_id
    record.config = what_is_measured(cell.config)
    record.metrics = record.metrics | {
        "median_tpot_ms": tpot,
        "revisit_median_tpot_ms": tpot / 2,
        "r_floor": 5 / tpot,
        "floor_ms": 5.0,
    }
    record.step_times_ms = [tpot * 0.9, tpot, tpot * 1.1]
    record.study = record.study | {"p50_ms": tpot}
    return Observation(dataclasses.replace(record, **changes), f"run{number:02}")


@pytest.fixture(scope="module")
def experiment(composer: Composer) -> ExperimentConfig:
    """The study's, its claims made of the tests' model."""
    found = composer.cell(["experiment=graphs_ab"]).experiment
    for claim in found.claims:
        claim.where = {**claim.where, "model.name": "tiny"}
    return found


@pytest.fixture(scope="module")
def arm(composer: Composer, profiles: dict[str, Any]) -> Any:
    """A cell on the H200's profile."""

    def arm(*overrides: str) -> Cell:
        from planning import H200

        from registry.plan import Planner
        from registry.plugins import Catalog

        return Planner(Catalog(), profiles, H200).plan(
            composer.cell(["model=tiny", "gpu=h200", "context=2048", *overrides])
        )

    return arm


@pytest.fixture(scope="module")
def sessions(arm: Any) -> list[Observation]:
    """Three sessions of both arms, in another order each time."""
    eager, graphed = arm("execution.cache=static"), arm("execution=cuda_graph")
    found = []
    for session, times in enumerate(zip(EAGER, GRAPHED, strict=True)):
        both = [(eager, times[0]), (graphed, times[1])]
        for cell, tpot in both if session % 2 else both[::-1]:
            found.append(run(cell, len(found), tpot, session=session, experiment="graphs_ab"))
    return found


def under(one: registration.Registration, found: Sequence[Observation], **changes: Any) -> list[Observation]:
    """The same runs, measured under a registration."""
    given = {"registration": one.sha256, "sweep_id": one.sweep_id} | changes
    return [dataclasses.replace(run, record=dataclasses.replace(run.record, **given)) for run in found]


def fixed(
    experiment: ExperimentConfig, found: Sequence[Observation] = (), **changes: Any
) -> registration.Registration:
    """A registration of what these runs measured."""
    given: dict[str, Any] = {
        "record_id": "s-graphs_ab",
        "sweep_id": "20260701-101010-abcd",
        "experiment": experiment,
        "gpus": {"h200": 4800.0},
        "sessions": 3,
        "seed": 0,
        "cells": [{"session": run.record.session, "cell_id": run.record.cell_id, "label": ""} for run in found],
        "registered_at": "2026-07-01T09:00:00.000+00:00",
    }
    one = registration.Registration(**(given | changes))
    one.sha256 = one.digest()
    return one


# Cells and pairs


def test_sessions_of_a_cell_are_one_cell(sessions: list[Observation]) -> None:
    found = cells(sessions)
    assert sorted(len(one.observations) for one in found) == [3, 3]
    eager = next(one for one in found if one.config["execution"]["name"] == "eager")
    assert eager.median("median_tpot_ms") == 14.5
    assert eager.spread.within == pytest.approx(0.1)
    assert eager.spread.across == pytest.approx(statistics.stdev(EAGER) / statistics.mean(EAGER))


def test_what_a_cell_may_take_makes_it_no_other_cell(arm: Any) -> None:
    found = [run(arm(), 0), run(arm("protocol.timeout_s=99", "protocol.profiled_steps=3"), 1, session=1)]
    assert len(cells(found)) == 1
    assert len(cells([*found, run(arm("protocol.seed=5"), 2)])) == 2


def test_arms_are_paired_by_session_whatever_their_order(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    [pair] = pairs(sessions[::-1], experiment)
    assert pair.comparison.ratios == pytest.approx([e / g for e, g in zip(EAGER, GRAPHED, strict=True)])
    assert pair.difference_ms == pytest.approx(statistics.mean(EAGER) - statistics.mean(GRAPHED))


def test_a_session_of_another_sweep_is_a_session_of_its_own(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    again = [
        Observation(
            dataclasses.replace(o.record, sweep_id="another", record_id=f"{o.record.record_id}b"), f"{o.run_id}b"
        )
        for o in sessions
    ]
    [pair] = pairs([*sessions, *again], experiment)
    assert len(pair.comparison.ratios) == 6


def test_a_session_that_lacks_an_arm_is_left_out(sessions: list[Observation], experiment: ExperimentConfig) -> None:
    lost = dataclasses.replace(sessions[0].record, outcome=Outcome.OOM, metrics={}, step_times_ms=[])
    [pair] = pairs([Observation(lost, "x"), *sessions[1:]], experiment)
    assert len(pair.comparison.ratios) == 2


def test_cells_of_other_devices_are_other_cells(sessions: list[Observation], experiment: ExperimentConfig) -> None:
    record = sessions[0].record
    elsewhere = dataclasses.replace(
        record, environment=record.environment | {"device": {"name": "NVIDIA L4 too"}}, cell_id="e" * 16
    )
    assert len(cells([*sessions, Observation(elsewhere)])) == 3
    assert len(pairs([*sessions[1:], Observation(elsewhere)], experiment)[0].comparison.ratios) == 2


# Verdicts


def verdicts(
    found: list[Observation], experiment: ExperimentConfig, *registered: registration.Registration
) -> list[str]:
    """What is said of runs that were measured under the first of some registrations."""
    measured = under(registered[0], found) if registered else found
    return build(experiment, measured, registered).verdict_lines


def with_threshold(experiment: ExperimentConfig, speedup: float) -> ExperimentConfig:
    claims = [dataclasses.replace(claim, speedup=speedup) for claim in experiment.claims]
    return dataclasses.replace(experiment, claims=claims)


def test_the_registered_threshold_decides_and_not_today_s(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    lenient = with_threshold(experiment, 9.0)
    told = verdicts(sessions, lenient, fixed(experiment, sessions))
    assert told[0].startswith("survives: launch overhead")
    assert "other thresholds today" in told[1]
    assert verdicts(sessions, experiment, fixed(lenient, sessions))[0].startswith("killed: launch overhead")
    without = dataclasses.replace(experiment, claims=[])
    assert verdicts(sessions, without, fixed(experiment, sessions))[0].startswith("survives: launch overhead")


def test_the_registered_arms_are_compared(sessions: list[Observation], experiment: ExperimentConfig) -> None:
    swapped = dataclasses.replace(experiment, baseline="cuda_graph", candidate="eager")
    assert verdicts(sessions, swapped, fixed(experiment, sessions))[0].startswith("survives")


def test_each_sweep_is_judged_by_its_own_registration(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    first = fixed(experiment, sessions)
    later = {"sweep_id": "20260702-101010-abcd", "record_id": "t", "registered_at": "2026-07-01T09:30:00.000+00:00"}
    second = fixed(with_threshold(experiment, 9.0), sessions, **later)
    told = build(experiment, [*under(first, sessions), *under(second, sessions)], [second, first]).verdicts
    assert [*told] == [first.record_id, second.record_id]
    assert told[first.record_id][0].startswith("survives")
    assert told[first.record_id][-1].endswith(f"sha256 {first.sha256[:16]}, sweep {first.sweep_id}")
    assert told[second.record_id][0].startswith("killed")
    assert all("at 3 sessions" in lines[0] for lines in told.values())


@pytest.mark.parametrize(
    "change",
    [
        {"registered_at": "2026-07-01T10:03:30.000+00:00"},  # before the last two runs alone
        {"cells": []},
        {"cells": [{"session": session, "cell_id": "f" * 16, "label": ""} for session in range(3)]},
    ],
)
def test_runs_that_were_not_registered_before_they_began_decide_nothing(
    sessions: list[Observation], experiment: ExperimentConfig, change: dict[str, Any]
) -> None:
    told = verdicts(sessions, experiment, fixed(experiment, sessions, **change))
    assert told[0].startswith("no verdict")
    assert re.search(r"left out of the sweep: \d runs? not of what was registered", told[1])


def test_runs_measured_under_another_registration_decide_nothing(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    """Somebody wrote another threshold and another hash into the file, and not into the records."""
    then = under(fixed(with_threshold(experiment, 9.0), sessions), sessions)
    told = build(experiment, then, [fixed(experiment, sessions)]).verdict_lines
    assert told[0].startswith("no verdict")
    assert "left out of the sweep: 6 runs" in told[1]


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("2026-07-01T10:00:00.000+00:00", " on disk and in MLflow, run mine; sha256"),  # when the first cell began
        ("2026-07-01T10:00:00.001+00:00", " on disk only; MLflow's run mine was opened 2026-07-01T10:00:00.001"),
        ("", " on disk; MLflow's run mine does not say when it was opened; sha256"),
        ("2026-07-01T10:00:00", "does not say when"),
        (None, " on disk only; sha256"),
    ],
)
def test_a_verdict_says_whether_mlflow_had_the_thresholds_before_the_first_cell(
    sessions: list[Observation], experiment: ExperimentConfig, tag: str | None, words: str
) -> None:
    one = fixed(experiment, sessions)
    logged = {} if tag is None else {one.record_id: registration.Logged.told("mine", tag)}
    line = build(experiment, under(one, sessions), [one], logged=logged).verdict_lines[-1]
    assert line.startswith(f"registered {one.registered_at}{words.partition(' on')[1]}")
    assert words in line


def test_there_is_no_verdict_before_the_last_session(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    told = verdicts(sessions[:5], experiment, fixed(experiment, sessions))
    assert told[0].startswith("no verdict yet: launch overhead")
    assert "both arms measured in 2 of 3 registered sessions: eager not run yet in session 2)" in told[0]
    told = verdicts(sessions[::2], experiment, fixed(experiment, sessions))
    assert "both arms measured in 0 of 3 registered sessions: " in told[0]


def failing(found: Sequence[Observation], *lost: int) -> list[Observation]:
    """The same runs; the graph's ran out of memory in these sessions."""
    ended = {"outcome": Outcome.OOM, "metrics": {}, "step_times_ms": []}
    return [
        dataclasses.replace(one, record=dataclasses.replace(one.record, **ended))
        if one.record.session in lost and one.record.config["execution"]["name"] == "cuda_graph"
        else one
        for one in found
    ]


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ((2,), "2 of 3 registered sessions: cuda_graph oom in session 2)"),
        ((0, 2), "1 of 3 registered sessions: cuda_graph oom in sessions 0, 2)"),
        ((0, 1, 2), "0 of 3 registered sessions: cuda_graph oom in sessions 0, 1, 2)"),
    ],
)
def test_a_session_that_failed_leaves_a_claim_undecided(
    sessions: list[Observation], experiment: ExperimentConfig, lost: tuple[int, ...], words: str
) -> None:
    """Whatever the others say: who leaves the failed ones out may leave out what would have decided."""
    [line, _] = verdicts(failing(sessions, *lost), experiment, fixed(experiment, sessions))
    assert line.startswith("inconclusive: launch overhead")
    assert f"(h200, tiny, ctx 2048, batch 1; both arms measured in {words}" in line


def test_a_session_that_failed_and_one_to_come_are_both_told(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    [line, _] = verdicts(failing(sessions[:5], 1), experiment, fixed(experiment, sessions))
    assert line.startswith("no verdict yet: launch overhead")
    assert line.endswith("1 of 3 registered sessions: eager not run yet in session 2; cuda_graph oom in session 1)")


def test_a_block_s_failure_leaves_other_blocks_decided(
    sessions: list[Observation], experiment: ExperimentConfig, arm: Any
) -> None:
    claims = [dataclasses.replace(claim, where={"model.name": "tiny"}) for claim in experiment.claims]
    everywhere = dataclasses.replace(experiment, claims=claims)
    longer = {
        name: arm(f"execution={name}", "execution.cache=static", "context=1024") for name in ("eager", "cuda_graph")
    }
    other = [
        run(
            longer[one.record.config["execution"]["name"]],
            10 + place,
            one.record.metrics["median_tpot_ms"],
            session=one.record.session,
            experiment="graphs_ab",
        )
        for place, one in enumerate(sessions)
    ]
    found = [*sessions, *failing(other, 0)]
    told = verdicts(found, everywhere, fixed(everywhere, found))
    assert [line.partition(":")[0] for line in told[:2]] == ["survives", "inconclusive"]
    assert "ctx 2048, batch 1; mean speedup" in told[0]
    assert "ctx 1024, batch 1; both arms measured in 2 of 3" in told[1]


def test_student_s_interval_decides_where_the_bootstrap_s_would_have_it_otherwise(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    """A few sessions' percentile interval is too short: a threshold just below it is not survived yet."""
    [pair] = pairs(sessions, experiment)
    student, bootstrap = pair.comparison.student, pair.comparison.bootstrap
    assert student is not None
    assert bootstrap is not None
    between = with_threshold(experiment, (student.low + bootstrap.low) / 2)
    assert student.low < between.claims[0].speedup < bootstrap.low
    assert verdicts(sessions, between, fixed(between, sessions))[0].startswith("inconclusive: launch overhead")


def test_another_interval_than_the_registered_one_judges_nothing(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    [line, _] = verdicts(sessions, experiment, fixed(experiment, sessions, interval="by eye"))
    assert line.startswith("no verdict: registered to be judged by by eye")


def test_without_a_registration_there_is_no_verdict(
    sessions: list[Observation], experiment: ExperimentConfig
) -> None:
    assert verdicts(sessions, experiment) == [
        "no verdict: no registration of thresholds from before these runs was found"
    ]


def test_a_claim_is_of_its_cells_alone(arm: Any, experiment: ExperimentConfig) -> None:
    """At another context, and on a GPU between the two rules, nothing was claimed."""
    for overrides in (["context=1024"], ["gpu.peak_bandwidth_gbs=1500"]):
        both = [arm("execution.cache=static", *overrides), arm("execution=cuda_graph", *overrides)]
        found = [run(cell, place, 10.0 + place) for place, cell in enumerate(both)]
        assert judged(pairs(found, experiment), experiment) == []
        told = verdicts(found, experiment, fixed(experiment, found))
        assert told[0] == "no verdict: no threshold was registered for this GPU and these cells"


# What is told


def test_every_figure_is_traced_to_its_run(sessions: list[Observation], experiment: ExperimentConfig) -> None:
    told = markdown(build(experiment, sessions, [fixed(experiment)]))
    assert re.search(r"\| h200, tiny, ctx 2048, batch 1 \| 3 \| 14\.500 \| 10\.00% \| 3\.45% \| 11\.533", told)
    for number, one in enumerate(sessions):
        assert re.search(rf"^\| \d+ \| run{number:02} \| record{number} \| ok \|", told, re.MULTILINE), one
    [row] = re.findall(
        r"^\| h200, tiny, ctx 2048, batch 1 \| 0 \| 14\.000 \| 11\.000 \| 1\.2727 \| (.*) \|$", told, re.MULTILINE
    )
    runs = dict(re.findall(r"^\| (\d+) \| (run\d\d) \|", told, re.MULTILINE))
    assert {runs[number] for number in row.split(", ")} == {"run00", "run01"}


def test_runs_that_follow_one_another_are_named_by_the_first_and_the_last(sessions: list[Observation]) -> None:
    some = [sessions[place] for place in (5, 0, 1, 2)]
    table = Table(["which"], [Row(["all"], sessions), Row(["some"], some)])
    report = Report("matrix", "How far?", sections=[Section("Cells", (), [table])])
    told = markdown(report)
    assert "| all | 1-6 |" in told
    assert "| some | 1-3, 6 |" in told
    assert '<a href="#run-1">1</a>-<a href="#run-3">3</a></span>, <span' in page(report)


def test_a_gpu_that_the_study_did_not_have(sessions: list[Observation], experiment: ExperimentConfig) -> None:
    told = markdown(build(experiment, sessions))
    assert "The study did not have h200" in told
    assert re.search(r"^\| h100 \| context=2048 \| speedup \| .* \| 1\.259 \|  \|  \|  \|", told, re.MULTILINE)


def test_cards_of_one_name_are_counted(sessions: list[Observation], experiment: ExperimentConfig) -> None:
    """Two of one kind are told as two; one, or one that says no more than its name, by the name alone."""

    def told(*uuids: str) -> str:
        found = []
        for one, uuid in zip(sessions, uuids, strict=False):
            device = one.record.environment.get("device", {}) | {"name": "NVIDIA H200", "uuid": uuid}
            changed = dataclasses.replace(one.record, environment=one.record.environment | {"device": device})
            found.append(Observation(changed, one.run_id))
        return build(experiment, found).facts[0]

    assert told("GPU-1", "GPU-2", "GPU-1", "GPU-2") == "device: NVIDIA H200 (2 cards)"
    assert told("GPU-1", "GPU-1") == "device: NVIDIA H200"
    assert told("", "GPU-1") == told("", "") == "device: NVIDIA H200"


class Addresses(html.parser.HTMLParser):
    """Where a page would load something from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.found += [given[name] or "" for name in ("src", "data") if name in given]
        if tag == "link":
            self.found.append(given.get("href") or "")
        if tag == "a":
            self.links.append(given["href"] or "")
        if "id" in given:
            self.ids.append(given["id"] or "")


def test_a_page_needs_nothing_else(sessions: list[Observation], experiment: ExperimentConfig, tmp_path: Path) -> None:
    files = write(build(experiment, sessions, [fixed(experiment)]), tmp_path / "told")
    assert [file.name for file in files] == ["report.html", "report.md"]
    text = files[0].read_text(encoding="utf-8")
    seen = Addresses()
    seen.feed(text)
    assert seen.found == []
    assert text.count("Plotly.newPlot(") >= 2
    assert seen.links
    assert {link.removeprefix("#") for link in seen.links} <= set(seen.ids)


def test_a_machine_without_plotly_writes_the_tables(
    sessions: list[Observation], experiment: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    [file] = write(build(experiment, sessions), tmp_path)
    assert "no page was drawn here" in file.read_text()
    assert "| h200, tiny, ctx 2048, batch 1 | 3 |" in file.read_text()


def test_a_terminal_of_any_width_is_told_every_figure(
    sessions: list[Observation], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.report.terminal.console", lambda: Console(width=60))
    told = [f"{number}.25-{number}.75" for number in range(100, 112)]
    table = Table(["quant", *["range"] * len(told)], [Row(["gptq-exllamav2", *told])])
    tell_report(Report("wide", "", sections=[Section("Cells", tables=[table], on_terminal=True)]), [])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(Counter(shown)[digit] >= Counter("".join(told))[digit] for digit in "0123456789")


def test_a_narrow_window_goes_without_the_columns_that_can_be_spared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(["quant", "TPOT ms", "within", "across"], [Row(["nf4", "7.73", "0.11%", "0.22%"])], 1, ("within",))
    report = Report("matrix", "How far?", sections=[Section("Cells", (), [table], on_terminal=True)])

    def told(width: int) -> str:
        monkeypatch.setattr("registry.report.terminal.console", lambda: Console(width=width))
        tell_report(report, [])
        return capsys.readouterr().out

    assert re.search(r"nf4 +7.73 +0.11% +0.22%", told(80))
    assert re.search(r"nf4 +7.73 +0.22%", narrow := told(28))
    assert "Left out for want of room: within" in narrow
    assert "Left out" not in told(80)


def test_a_terminal_shows_what_a_report_is_about(
    sessions: list[Observation], composer: Composer, capsys: pytest.CaptureFixture[str]
) -> None:
    """batch4 asks two things: both tables are there, and the sessions one by one are not."""
    tell_report(build(composer.cell(["experiment=batch4"]).experiment, sessions), [])
    shown = capsys.readouterr().out
    assert "eager against cuda_graph" in shown
    assert "Batch size" in shown
    assert "Sessions" not in shown


def test_a_long_first_column_is_broken_into_lines(sessions: list[Observation]) -> None:
    """A warning in one line would push the other columns off the screen; a cell's name is no longer than a line."""
    for text, kind in (("throttled before the window by software power cap", "long"), ("h200, tiny", "short")):
        table = Table(["what", "cells"], [Row([text, "eager"], sessions[:1]), Row(["short", "eager"])], 2)
        told = page(Report("matrix", "How far?", sections=[Section("What", (), [table])]))
        assert f'<td class="text {kind}">{text}</td><td class="text">eager</td>' in told


def test_a_page_shows_what_it_is_given_as_text(sessions: list[Observation]) -> None:
    nasty = "<script>alert(1)</script>|x"
    table = Table(["a", nasty], [Row([nasty, "1"], sessions[:1])])
    report = Report(nasty, nasty, [nasty], [Section(nasty, [nasty], [table])], {nasty: [nasty]})
    assert "<script>alert" not in page(report)
    assert "\\|x | 1 |" in markdown(report)


@pytest.mark.parametrize(
    "name", ["matrix", "batch4", "quant", "stack", "attention", "profile", "cost", "body", "floor"]
)
def test_every_experiment_reports_on_runs_of_any_outcome(
    composer: Composer, arm: Any, name: str, tmp_path: Path
) -> None:
    """One good cell, one without a figure: no section stumbles over either."""
    told = composer.cell([f"experiment={name}"]).experiment
    good = run(arm(), 0, 20.0, experiment=name)
    good.record.measured = {"profile": ONE_PROFILE}
    found = [good]
    if name == "attention":
        found.append(run(arm("protocol=attention"), 2, experiment=name, kind="attention", step_times_ms=[]))
        found[-1].record.metrics, found[-1].record.call_times_us = {"median_call_us": 20.0}, [20.0]
        found[-1].record.measured = {"sdp_enabled": {}}
    refused = run(
        arm("quant=nf4"),
        1,
        experiment=name,
        outcome=Outcome.UNSUPPORTED,
        reason="no such kernel",
        metrics={},
        step_times_ms=[],
    )
    text = write(build(told, [*found, refused]), tmp_path)[1].read_text()
    assert re.search(r"\| 20\.00+ \|", text)
    assert ("no such kernel" in text) == (name != "cost")  # which tells of all that was ever run


def test_the_cheapest_lever_of_each_gpu(arm: Any, composer: Composer) -> None:
    told = composer.cell(["experiment=cost"]).experiment
    found = [run(arm(), 0, 20.0), run(arm("execution=cuda_graph"), 1, 10.0)]
    text = markdown(build(told, found, prices={"h200": 3.6}))
    # 3.6 $/h and 10 ms a token: 0.001 $/s, 100 tokens a second, 10 $ a million.
    assert re.search(
        r"\| tiny \| 2048 \| 1 \| h200 \|.* cuda_graph .*"
        r"\| 3\.60 \| 10\.00 \| 10\.00% \|  \| 10\.00 \| 1\.00 \| 1 \|",
        text,
    )


# The study's own files


def exported(tmp_path: Path, shape: str, *found: Observation) -> dict[str, dict[str, Any]]:
    records = [dataclasses.replace(one.record, experiment="x") for one in found]
    done = export(records, {"x": of_shape(shape)}, tmp_path / "study")
    assert done.left_out == 0
    assert len({*done.files}) == len(done.files)
    return {file.name: json.loads(file.read_text()) for file in done.files}


def of_shape(shape: str) -> ExperimentConfig:
    return ExperimentConfig(name="x", arms="execution", baseline="eager", candidate="cuda_graph", study_files=shape)


def test_both_arms_of_a_session_are_one_file(sessions: list[Observation], tmp_path: Path) -> None:
    found = exported(tmp_path, "pairs", *sessions)
    assert sorted(found) == [f"cudagraphs_h200_tiny_ctx2048_s{n}.json" for n in range(3)]
    first = found["cudagraphs_h200_tiny_ctx2048_s0.json"]
    assert (first["eager_p50_ms"], first["graphed_p50_ms"], first["p50_ms"]) == (14.0, 11.0, 14.0)
    assert {"arch", "t_floor_ms", "R_floor", "bw_peak_gbs"} <= set(first)


def test_a_plain_cell_has_the_study_s_name_and_keys(arm: Any, tmp_path: Path) -> None:
    found = exported(tmp_path, "cells", run(arm(), 0))
    assert list(found) == ["tiny_h200_ctx2048.json"]


@pytest.mark.parametrize(
    ("execution", "skips", "compiled", "graphs"),
    [
        ("eager", 0, False, False),
        ("cuda_graph", 0, False, True),
        ("compile", 0, True, False),
        ("compile-reduce-overhead", 0, True, True),
        ("compile-reduce-overhead", 2, True, False),
    ],
)
def test_a_stack_s_flags(arm: Any, tmp_path: Path, execution: str, skips: int, compiled: bool, graphs: bool) -> None:
    """A compile mode that records CUDA graphs has both, unless they were skipped."""
    one = run(arm(f"execution={execution}"), 0)
    one.record.measured = one.record.measured | {"execution": {"cudagraph_skips": skips}}
    [content] = exported(tmp_path, "stack", one).values()
    assert (content["attn"], content["compile"], content["graphs"]) == ("sdpa", compiled, graphs)


def test_a_profile_s_keys(arm: Any, tmp_path: Path) -> None:
    one = run(arm(), 0)
    one.record.metrics |= {"bw_util": 0.25, "cpu_cuda_ratio": 0.75}
    [content] = exported(tmp_path, "profile", one).values()
    assert (content["bw_util"], content["cpu_cuda_ratio"]) == (0.25, 0.75)


def test_records_of_no_experiment_have_no_file(arm: Any, tmp_path: Path) -> None:
    done = export([run(arm(), 0).record], {"matrix": of_shape("cells")}, tmp_path / "study")
    assert (done.files, done.left_out) == ([], 1)


def test_cells_that_the_study_calls_the_same_have_a_file_each(arm: Any, tmp_path: Path) -> None:
    overrides = ["quant=nf4", "protocol.seed=5", "protocol.measured_steps=3", "attention=sdpa-math", "quant=none"]
    found = exported(tmp_path, "cells", *(run(arm(one), place, 10.0 + place) for place, one in enumerate(overrides)))
    assert sorted(content["p50_ms"] for content in found.values()) == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert all(name.startswith("tiny_h200_ctx2048_20260701-101010-abcd-") for name in found)
    again = run(arm(), 9, 50.0, sweep_id="later")
    found = exported(tmp_path, "cells", run(arm(), 0, 10.0), again)
    assert sorted(content["p50_ms"] for content in found.values()) == [10.0, 50.0]


def test_arms_of_two_sweeps_or_two_caches_are_no_one_file(arm: Any, tmp_path: Path) -> None:
    """99 ms of another sweep is not the eager time of this sweep's 11 ms."""
    static, graphed = arm("execution.cache=static"), arm("execution=cuda_graph")
    found = [run(static, 0, 14.0), run(graphed, 1, 11.0), run(static, 2, 99.0, sweep_id="later")]
    told = exported(tmp_path, "pairs", *found, run(arm(), 3, 50.0))
    assert sorted((one["eager_p50_ms"], one.get("graphed_p50_ms", 0)) for one in told.values()) == [
        (14.0, 11.0),
        (50.0, 11.0),
        (99.0, 0),
    ]


def test_what_is_no_arm_has_no_file(arm: Any, tmp_path: Path) -> None:
    found = [run(arm("execution=compile"), 0, 5.0), run(arm("execution=cuda_graph"), 1, 11.0)]
    records = [dataclasses.replace(one.record, experiment="x") for one in found]
    done = export(records, {"x": of_shape("pairs")}, tmp_path)
    assert (len(done.files), done.left_out, done.renamed) == (1, 1, 0)
    assert json.loads(done.files[0].read_text()).keys() >= {"graphed_p50_ms"}
    assert "eager_p50_ms" not in json.loads(done.files[0].read_text())

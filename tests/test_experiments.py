"""Named experiments: their cells, the order of sessions, what is registered beforehand, and a whole one."""

import dataclasses
import json
import operator
import re
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from planning import H200
from sweeps import Start, Sweep, database

from registry import record as records
from registry import registration
from registry.compose import Composer
from registry.display import plan_notes
from registry.experiments import applies, blocks, matches
from registry.hardware import cpu_device
from registry.outcome import BadInput
from registry.plan import Cell, Planner
from registry.plugins import Catalog
from registry.report.build import SECTIONS
from registry.schema import ClaimConfig, GpuConfig, StudyFigure, from_plain
from registry.sessions import order
from registry.validate import SECTIONS as ALLOWED
from registry.validate import validate

FIELDS = {one.name for one in dataclasses.fields(registration.Registration)}
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

EXPERIMENTS = [name for name in Composer(Catalog()).options("experiment") if name != "none"]
MEASURED = [name for name in EXPERIMENTS if name != "cost"]


def jobs(composer: Composer, *overrides: str) -> list[list[str]]:
    return composer.jobs(overrides, multirun=True)


def planned(
    composer: Composer, profiles: dict[str, GpuConfig], *overrides: str
) -> tuple[list[list[str]], list[Cell]]:
    found = jobs(composer, *overrides)
    planner = Planner(composer.catalog, profiles, H200)
    return found, [planner.plan(composer.cell(job)) for job in found]


# What conf/experiment holds


@pytest.mark.parametrize("name", MEASURED)
def test_every_experiment_is_a_sweep_of_valid_cells(composer: Composer, name: str) -> None:
    found = jobs(composer, f"experiment={name}")
    assert len(found) > 1
    for job in found:
        config = composer.cell(job)
        validate(config)
        assert config.experiment.name == name
        assert config.experiment.question.endswith("?")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_figure_of_the_study_has_a_source_and_names_keys_that_exist(composer: Composer, name: str) -> None:
    config = composer.cell([f"experiment={name}"])
    plain = dataclasses.asdict(config)
    for figure in [*config.experiment.study, *config.experiment.claims]:
        assert figure.source.strip()
        for key in figure.where:
            node = plain
            for part in key.split("."):
                node = node[part]


def test_what_a_report_may_be_made_of_is_what_there_is() -> None:
    assert set(ALLOWED) == set(SECTIONS)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("matrix", 12),
        ("graphs_ab", 6),
        ("batch4", 14),
        ("attention", 40),
        ("stack", 27),
        ("quant", 15),
        ("profile", 2),
        ("body", 16),
        ("floor", 26),
    ],
)
def test_how_many_cells(composer: Composer, name: str, cells: int) -> None:
    assert len(jobs(composer, f"experiment={name}")) == cells


def test_the_kill_thresholds_are_the_study_s(composer: Composer) -> None:
    """Fixed beforehand there: below 1.15 on the H100, above 1.15 on the L4 (arXiv 2605.30571, section 5)."""
    claims = composer.cell(["experiment=graphs_ab"]).experiment.claims
    assert [(one.killed_if, one.speedup, one.above_gbs, one.below_gbs) for one in claims] == [
        ("below", 1.15, 2000, None),
        ("above", 1.15, None, 1000),
    ]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("paper", (2048, 1, 5, 30, 0)), ("attention", (2048, 1, 50, 300, 0)), ("quick", (512, 1, 5, 30, 0))],
)
def test_the_protocols_numbers(composer: Composer, name: str, numbers: tuple[int, ...]) -> None:
    p = composer.cell([f"protocol={name}"]).protocol
    assert (p.context, p.batch_size, p.warmup_steps, p.measured_steps, p.seed) == numbers


@pytest.mark.parametrize(
    ("name", "sessions"), [("graphs_ab", 10), ("attention", 3), ("quant", 3), ("matrix", 1), ("batch4", 10)]
)
def test_how_often_an_experiment_s_cells_are_measured(composer: Composer, name: str, sessions: int) -> None:
    found = {composer.cell(job).protocol.sessions for job in jobs(composer, f"experiment={name}")[::7]}
    assert found == {sessions}


# The command line


def test_the_call_s_axes_take_the_place_of_the_experiment_s(composer: Composer) -> None:
    found = jobs(composer, "experiment=matrix", "model=tiny", "protocol.context=16,32", "quant=none,nf4")
    assert len(found) == 4
    assert {text for job in found for text in job if "context" in text} == {
        "protocol.context=16",
        "protocol.context=32",
    }
    assert all("model=tiny" in job and "protocol=paper" in job for job in found)


def test_cells_that_two_products_share_are_measured_once(composer: Composer) -> None:
    """batch4's second product is at one context; told to be at the first one's batch it has nothing of its own."""
    found = jobs(composer, "experiment=batch4", "protocol.batch_size=4")
    assert len(found) == 8


def test_cells_that_two_products_write_in_different_words_are_measured_once() -> None:
    """attention times kernels alone and then steps; told to time kernels, eagerly, both are the same cells."""
    from registry.sweep import _composer, _parse, preflight

    given = ["experiment=attention", "protocol=attention", "model=tiny", "attention=sdpa,sdpa-math", "gpu=cpu"]
    args = _parse(["-m", *given, "execution=eager", "context=64", "protocol.sessions=2"])
    found = preflight(args, _composer())
    assert [cell.config.attention.name for cell in found.cells] == ["sdpa", "sdpa-math"]
    assert len(found.jobs) == len({job.what for job in found.jobs}) == 4
    plain = preflight(_parse(["-m", "model=tiny", "gpu=cpu", "quant=none,none"]), _composer())
    assert len(plain.cells) == 2, "a call that asks for a cell twice gets it twice"


def test_several_experiments_in_one_call(composer: Composer) -> None:
    found = jobs(composer, "experiment=matrix,profile", "protocol.sessions=1")
    assert Counter(job[0] for job in found) == {"experiment=matrix": 12, "experiment=profile": 2}


def test_no_experiment_is_a_plain_sweep(composer: Composer) -> None:
    assert jobs(composer, "experiment=none", "quant=nf4,nf4") == [["experiment=none", "quant=nf4"]] * 2


@pytest.mark.parametrize(
    ("overrides", "multirun", "words"),
    [
        (["experiment=matrix"], False, "experiment=matrix is a sweep, add -m"),
        (["experiment=cost"], True, "rfloor report cost"),
        (["experiment=matrx"], True, "did you mean matrix?"),
    ],
)
def test_refused_before_composing(composer: Composer, overrides: list[str], multirun: bool, words: str) -> None:
    with pytest.raises(BadInput, match=words.replace("?", r"\?")):
        composer.jobs(overrides, multirun)


def test_an_arm_that_is_left_out_is_refused(composer: Composer, profiles: dict[str, GpuConfig]) -> None:
    found, cells = planned(composer, profiles, "experiment=graphs_ab", "execution=eager")
    with pytest.raises(
        BadInput, match="compares execution=eager with execution=cuda_graph, and the call leaves cuda_graph"
    ):
        blocks(found, cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "a name of letters"),
        ({"study": [StudyFigure("r_floor", 0.0, "h100", source="s")]}, "a ratio to it is told"),
        ({"study": [StudyFigure("", 1.0, "h100", source="s")]}, "a ratio to it is told"),
        ({"study": [StudyFigure(gpu="h100", source="s", outcome="omm")]}, "did you mean oom"),
        ({"study": [StudyFigure("speedup", gpu="h100", source="s", outcome="oom")]}, "no metric and no value beside"),
        ({"study": [StudyFigure("r_floor", 1.0, "h100", source="s", over="mean")]}, "over=mean: "),
        ({"study": [StudyFigure("r_floor", 1.0, "h100", source="s", cells=-1)]}, "cells=-1: at least 1"),
        ({"arms": "exekution"}, "arms is one of"),
        ({"arms": "execution"}, "has a baseline and a candidate"),
        ({"report": ["matricks"]}, "did you mean matrix"),
        ({"study_files": "cell"}, "did you mean cells"),
        ({"claims": [ClaimConfig("c", "below", 1.15, source="s")]}, "a claim is made of two arms"),
        (
            {
                "arms": "quant",
                "baseline": "a",
                "candidate": "b",
                "claims": [ClaimConfig("c", "belo", 1.15, source="s")],
            },
            "did you mean below",
        ),
    ],
)
def test_an_experiment_that_cannot_be_meant_is_refused(
    composer: Composer, changes: dict[str, object], words: str
) -> None:
    config = composer.cell(["experiment=matrix"])
    config.experiment = dataclasses.replace(config.experiment, **changes)
    with pytest.raises(BadInput, match=words):
        validate(config)


def test_a_dry_run_lists_the_cells_as_typed_and_how_often_they_are_measured(
    composer: Composer, profiles: dict[str, GpuConfig]
) -> None:
    _, cells = planned(composer, profiles, "experiment=graphs_ab")
    assert plan_notes(cells)[-1] == "Each cell is measured in 10 sessions"
    _, cells = planned(composer, profiles, "experiment=matrix")
    assert not any("sessions" in note for note in plan_notes(cells))


def test_no_cell_is_told_to_leave_out_an_arm_that_its_experiment_compares(
    composer: Composer, profiles: dict[str, GpuConfig]
) -> None:
    planner = Planner(composer.catalog, profiles, cpu_device())
    small = ("model=tiny", "context=2048", "gpu=cpu")
    cells = {
        name: [planner.plan(composer.cell(job)) for job in jobs(composer, f"experiment={name}", *small)]
        for name in ("graphs_ab", "profile")
    }
    remedies = {name: {one.refusal.remedy for one in found if one.refusal} for name, found in cells.items()}
    assert remedies == {"graphs_ab": {""}, "profile": {"Use execution=eager"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: mine\nqestion: x\ncells: [{model: tiny}]", "Key 'qestion' not in 'ExperimentConfig'"),
        ("name: mine\ncells: {model: tiny}", "Cannot merge DictConfig with ListConfig"),
        ("name: mine\ncells: [", "found '<stream end>' in .*mine.yaml"),
        (
            'name: mine\ncells: [{model.weights: "a,b=c d"}]',
            "the cells of experiment=mine: cannot read an override: mismatched",
        ),
        ("name: other\ncells: [{model: tiny}]", "experiment=mine calls itself 'other'"),
    ],
)
def test_a_mistake_in_an_experiment_s_file_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(Catalog, "conf_folders", lambda _: [tmp_path])
    with pytest.raises(BadInput, match=words) as caught:
        Composer(Catalog()).jobs(["experiment=mine"], multirun=True)
    assert "\n" not in str(caught.value)


# Blocks and sessions


def test_arms_share_a_block(composer: Composer, profiles: dict[str, GpuConfig]) -> None:
    numbers = blocks(*planned(composer, profiles, "experiment=graphs_ab"))
    assert numbers == [0, 0, 1, 1, 2, 2]


def test_cells_without_arms_have_a_block_each(composer: Composer, profiles: dict[str, GpuConfig]) -> None:
    assert blocks(*planned(composer, profiles, "quant=none,none", "context=16,32")) == [0, 1, 2, 3]


def test_one_session_of_uncompared_cells_keeps_their_order() -> None:
    assert order([0, 1, 2], sessions=1, seed=5) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_each_session_has_every_cell_and_blocks_stay_together(seed: int) -> None:
    numbers = [0, 0, 1, 1, 2, 2]
    found = order(numbers, sessions=4, seed=seed)
    assert sorted(found) == [(session, cell) for session in range(4) for cell in range(6)]
    assert [session for session, _ in found] == sorted(session for session, _ in found)
    blocks_met = [numbers[cell] for _, cell in found]
    assert all(one == other for one, other in zip(blocks_met[::2], blocks_met[1::2], strict=True))
    assert found == order(numbers, sessions=4, seed=seed)


def test_which_arm_comes_first_is_a_fair_coin() -> None:
    """Over many seeds and sessions each arm leads half the time, and every order of three blocks is met as often."""
    first: Counter[int] = Counter()
    sequences: Counter[tuple[int, ...]] = Counter()
    for seed in range(1200):
        found = [cell for _, cell in order([0, 0, 1, 1, 2, 2], sessions=1, seed=seed)]
        first[found[0] % 2] += 1
        sequences[tuple(cell // 2 for cell in found[::2])] += 1
    assert abs(first[0] - 600) < 4 * (1200 / 4) ** 0.5
    assert len(sequences) == 6
    assert all(abs(count - 200) < 4 * (1200 * 5 / 36) ** 0.5 for count in sequences.values())


@pytest.mark.parametrize("sessions", [10, 9])
def test_each_arm_leads_as_often_as_the_other(sessions: int) -> None:
    """In every block, and in an order that another sweep does not repeat."""
    leaders = set()
    for seed in range(20):
        found = order([0, 0, 1, 1], sessions, seed)
        first = tuple(cell for _, cell in found[::2])
        for arms in ((0, 1), (2, 3)):
            led = [cell for cell in first if cell in arms]
            assert abs(led.count(arms[0]) - led.count(arms[1])) == sessions % 2
        leaders.add(first)
    assert len(leaders) == 20


def led(seed: int) -> list[list[bool]]:
    """For two blocks of two arms, whether the first arm leads in each of ten sessions."""
    found = [cell for _, cell in order([0, 0, 1, 1], sessions=10, seed=seed)][::2]
    return [[cell == 2 * block for cell in found if cell // 2 == block] for block in (0, 1)]


def test_who_leads_is_drawn_anew_for_each_session() -> None:
    """Of the 252 patterns in which each arm leads five of ten sessions all are met, as often as each other; so the
    next session has the same leader in 4 of 9 cases."""
    seeds = 2520
    patterns = Counter(tuple(led(seed)[0]) for seed in range(seeds))
    same = sum(n * sum(map(operator.eq, p, p[1:])) for p, n in patterns.items()) / (9 * seeds)
    # Of all patterns the number of sessions that are led as the one before has the variance 4 * 5 / 9.
    assert same == pytest.approx(4 / 9, abs=4 * (20 / 9 / seeds) ** 0.5 / 9)
    assert len(patterns) == 252
    chi_square = sum((count - 10) ** 2 / 10 for count in patterns.values())
    assert abs(chi_square - 251) < 4 * (2 * 251) ** 0.5


def test_who_leads_in_one_block_says_nothing_of_another() -> None:
    """The same session has the same leader in both blocks as often as not."""
    seeds = 1000
    agreed = sum(sum(map(operator.eq, *led(seed))) for seed in range(seeds)) / (10 * seeds)
    # Sessions in which both agree: twice a hypergeometric count of variance 25 / 36.
    assert agreed == pytest.approx(0.5, abs=4 * (4 * 25 / 36 / seeds) ** 0.5 / 10)


# Claims


@pytest.mark.parametrize(
    ("gbs", "fast", "slow"), [(4800.0, True, False), (1500.0, False, False), (300.0, False, True)]
)
def test_which_rule_is_a_gpu_s(composer: Composer, gbs: float, fast: bool, slow: bool) -> None:
    claims = composer.cell(["experiment=graphs_ab"]).experiment.claims
    assert [applies(claim, gbs) for claim in claims] == [fast, slow]
    assert not any(applies(claim, None) for claim in claims)


def test_a_configuration_matches_by_dotted_keys() -> None:
    config = {"model": {"name": "tiny"}, "protocol": {"context": 16}}
    assert matches(config, {"model.name": "tiny", "protocol.context": 16})
    assert matches(config, {})
    assert not matches(config, {"protocol.context": 17})
    assert not matches(config, {"model.name.first": "tiny"})


# Registrations


def registered(composer: Composer, profiles: dict[str, GpuConfig]) -> registration.Registration:
    found, cells = planned(composer, profiles, "experiment=graphs_ab")
    ordered = [(session, cells[place]) for session, place in order(blocks(found, cells), 10, 0)]
    [one] = registration.register("20261122-101010-abcd", ordered, 0)
    return one


def test_a_registration_survives_its_file(composer: Composer, profiles: dict[str, GpuConfig], tmp_path: Path) -> None:
    one = registered(composer, profiles)
    assert len(one.cells) == 60
    assert one.gpus == {"h200": 4800.0}
    assert "above 2 TB/s" in one.tags()["registration.claims"]
    assert "below 1 TB/s" not in one.tags()["registration.claims"]
    file = registration.write(one, tmp_path)
    assert registration.from_json(json.loads(file.read_text())) == one


@pytest.mark.parametrize("change", ["threshold", "cells", "time"])
def test_a_registration_that_was_changed_later_is_refused(
    composer: Composer, profiles: dict[str, GpuConfig], change: str
) -> None:
    content = json.loads(json.dumps(registered(composer, profiles).plain()))
    if change == "threshold":
        content["experiment"]["claims"][0]["speedup"] = 1.01
    elif change == "cells":
        content["cells"].pop()
    else:
        content["registered_at"] = "2026-01-01T00:00:00.000+00:00"
    with pytest.raises(records.BadRecord, match="changed after it was made"):
        registration.from_json(content)


HASHED_AGAIN: dict[str, tuple[dict[str, object], str]] = {
    "cells": ({"cells": None}, "cells is a NoneType"),
    "cell": ({"cells": [{"session": 0}]}, "no session or no cell_id"),
    "sessions": ({"sessions": True}, "sessions is a bool"),
    "gpus": ({"gpus": {"l4": "300"}}, "gpus.l4 is a str"),
    "experiment": ({"experiment": "graphs_ab"}, "experiment is a str"),
    "time": ({"registered_at": "2026-01-01T00:00:00"}, "registered_at has no zone"),
}


@pytest.mark.parametrize("damage", HASHED_AGAIN)
def test_a_registration_of_the_wrong_types_is_refused_whatever_its_hash(
    composer: Composer, profiles: dict[str, GpuConfig], damage: str
) -> None:
    changes, told = HASHED_AGAIN[damage]
    content = json.loads(json.dumps(registered(composer, profiles).plain())) | changes
    content["sha256"] = registration._digest(
        {k: v for k, v in content.items() if k not in ("schema_version", "kind")}
    )
    with pytest.raises(records.BadRecord, match=re.escape(told)):
        registration.from_json(content)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": "engine"}, "experiment.arms is 'engine'"),
        ({"arms": 5}, "experiment.arms is a int"),
        ({"claims": [{"claim": "x"}]}, "no experiment.claims.0.killed_if"),
    ],
    ids=range(3),
)
def test_a_registration_of_an_experiment_that_is_none_is_refused(
    composer: Composer, profiles: dict[str, GpuConfig], change: dict[str, object], told: str
) -> None:
    content = json.loads(json.dumps(registered(composer, profiles).plain()))
    content["experiment"] |= change
    with pytest.raises(records.BadRecord, match=re.escape(told)):
        registration.from_json(content)


@pytest.mark.parametrize("content", [{}, {"schema_version": 1}, {"schema_version": 1, "kind": "experiment", "x": 1}])
def test_what_is_no_registration_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(records.BadRecord):
        registration.from_json(content)


# A whole one


@pytest.fixture(scope="module")
def measured(start: Start) -> Sweep:
    """Two sessions of two arms, on a profile whose bandwidth makes the test's claim apply."""
    return start("experiment=arms", "protocol.sessions=2", "gpu.peak_bandwidth_gbs=3000").end()


def test_every_cell_is_measured_in_every_session(measured: Sweep) -> None:
    assert measured.code == 0, measured.stderr
    found = measured.records()
    assert {record["experiment"] for record in found} == {"arms"}
    arms = [(record["session"], record["config"]["attention"]["name"]) for record in found]
    assert sorted(arms) == [(0, "sdpa"), (0, "sdpa-math"), (1, "sdpa"), (1, "sdpa-math")]
    assert len({record["cell_id"] for record in found}) == 2
    assert [session for session, _ in arms] == [0, 0, 1, 1]
    assert "within" in measured.stdout
    assert "across" in measured.stdout


def test_what_was_claimed_is_registered_before_the_first_arm_and_judged_after_the_last(measured: Sweep) -> None:
    client = MlflowClient(database(measured.home))
    experiment = client.get_experiment_by_name("rfloor")
    assert experiment is not None
    [sweep_id] = {record["sweep_id"] for record in measured.records()}
    runs = client.search_runs([experiment.experiment_id], f"tags.sweep_id = '{sweep_id}'")
    [own] = [run for run in runs if run.data.tags.get("kind") == "experiment"]
    cells = [run for run in runs if run is not own]
    assert len(cells) == 4
    assert own.info.status == "FINISHED"
    file = measured.folder / "records" / "experiments" / f"{sweep_id}-arms.json"
    content = json.loads(file.read_text())
    began = min(datetime.fromisoformat(record["started_at"]) for record in measured.records())
    logged = datetime.fromisoformat(own.data.tags["registration.logged_at"])
    assert datetime.fromisoformat(content["registered_at"]) <= logged <= began
    assert own.info.start_time >= int(logged.timestamp() * 1000), "the run begins when it is opened, not earlier"
    assert own.info.start_time <= min(run.info.start_time for run in cells)
    assert file.stat().st_mtime <= began.timestamp() + 0.001, "which is told in milliseconds"
    assert own.data.tags["registration.sha256"] == content["sha256"]
    assert {artifact.path for artifact in client.list_artifacts(own.info.run_id)} == {
        "registration.json",
        "report.html",
        "report.md",
    }
    verdict = own.data.tags["verdict"].split(":")[0]
    assert verdict in ("survives", "killed", "inconclusive")
    assert f"{verdict}: the math kernel is no faster" in measured.stdout
    assert f" on disk and in MLflow, run {own.info.run_id}; sha256" in measured.stdout
    assert content["sha256"][:16] in own.data.tags["verdict"]
    assert {run.data.tags["session"] for run in cells} == {"0", "1"}
    told = file.with_suffix("") / "report.md"
    assert all(run.info.run_id in told.read_text() for run in cells)


def test_a_report_out_of_mlflow_says_the_same(
    measured: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sweeps import FAULTS

    from registry import cli

    [sweep_id] = {record["sweep_id"] for record in measured.records()}
    target = tmp_path / "told"
    uri = f"tracking.uri={database(measured.home)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        assert cli.main(["report", "arms", f"out={target}", f"sweep={sweep_id}", uri]) == 0
    before = measured.folder / "records" / "experiments" / f"{sweep_id}-arms" / "report.md"
    assert (target / "report.md").read_text() == before.read_text()
    assert "no faster" in capsys.readouterr().out


def test_a_report_over_all_runs_has_one_run_of_its_own(
    measured: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However often it is drawn; no report takes that run for a record."""
    from sweeps import FAULTS

    from registry import cli

    uri = f"tracking.uri={database(tmp_path)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        assert cli.main(["import", str(measured.folder / "records"), uri, f"tracking.artifacts={tmp_path}/a"]) == 0
        for place in ("one", "two"):
            assert cli.main(["report", "cost", f"out={tmp_path / place}", "price.cpu=1", uri]) == 0
    client = MlflowClient(database(tmp_path))
    runs = client.search_runs([client.get_experiment_by_name("rfloor").experiment_id], "tags.kind = 'report'")
    [(name, status, run_id)] = [(run.info.run_name, run.info.status, run.info.run_id) for run in runs]
    assert (name, status) == ("report cost", "FINISHED")
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == {"report.html", "report.md"}
    capsys.readouterr()


def test_a_report_over_several_sweeps_leaves_each_its_own(
    measured: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a second sweep whose threshold would kill, in an MLflow of their own."""
    from sweeps import FAULTS

    from registry import cli

    folder, uri = tmp_path / "records", f"tracking.uri={database(tmp_path)}"
    shutil.copytree(measured.folder / "records", folder)
    [sweep_id] = {record["sweep_id"] for record in measured.records()}
    [file] = (folder / "experiments").glob("*.json")
    other = json.loads(file.read_text().replace(sweep_id, "20260101-000000-abcd"))
    other["experiment"]["claims"][0]["speedup"] = 1e-9
    other["registered_at"] = "2026-01-01T00:00:00.000+00:00"
    hashed = from_plain(registration.Registration, {k: v for k, v in other.items() if k in FIELDS})
    other["sha256"] = hashed.digest()
    file.with_name("20260101-000000-abcd-arms.json").write_text(json.dumps(other))
    for cell in list(folder.glob(f"{'[0-9a-f]' * 16}/*.json")):
        content = json.loads(cell.read_text())
        content |= {"sweep_id": "20260101-000000-abcd", "registration": other["sha256"], "record_id": cell.stem}
        cell.with_name(f"other-{content['index']}.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        assert cli.main(["import", str(folder), uri, f"tracking.artifacts={tmp_path}/a"]) == 0
        assert cli.main(["report", "arms", f"out={tmp_path / 'one'}", f"sweep={sweep_id}", uri]) == 0
        assert cli.main(["report", "arms", f"out={tmp_path / 'both'}", uri]) == 0
    client = MlflowClient(database(tmp_path))
    runs = client.search_runs([client.get_experiment_by_name("rfloor").experiment_id], "tags.kind = 'experiment'")
    assert len(runs) == 2
    for run in runs:
        own = run.data.tags["sweep_id"] == sweep_id
        assert f"sweep {run.data.tags['sweep_id']}" in run.data.tags["verdict"]
        assert run.data.tags["verdict"].count("registered 20") == 1
        found = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert found == {"registration.json", "pooled"} | ({"report.html", "report.md"} if own else set())
    assert (tmp_path / "both" / "report.md").read_text().count("**registered ") == 2
    capsys.readouterr()


def test_a_report_of_nothing_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from registry import cli

    uri = f"tracking.uri={database(tmp_path)}"
    assert cli.main(["report", "matrix", f"out={tmp_path / 'told'}", uri]) == 2
    assert "nothing was measured or imported there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "none").mkdir()
    assert cli.main(["import", str(tmp_path / "none"), uri, f"tracking.artifacts={tmp_path}/a"]) == 0
    assert cli.main(["report", "matrix", f"out={tmp_path / 'told'}", uri, "tracking.experiment=rflor"]) == 2
    assert "no experiment called 'rflor': did you mean rfloor?" in capsys.readouterr().err
    assert cli.main(["report", "cost", f"out={tmp_path / 'told'}", uri]) == 2
    assert "experiment=cost: measure some, or rfloor import" in capsys.readouterr().err
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["model=tiny"], "a report takes out=, sweep="),
        (["prices.cpu=1"], "a report takes out=, sweep="),
        (["sweep="], "sweep=VALUE"),
        (["out"], "out=VALUE"),
        (["out=a", "out=b"], "given twice"),
        (["price.cpuu=1"], "did you mean cpu"),
        (["price.cpu=-1"], "more than 0"),
    ],
)
def test_what_a_report_does_not_take_is_refused(
    given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from registry import cli

    assert cli.main(["report", "matrix", *given]) == 2
    assert words in capsys.readouterr().err


def test_a_sweep_that_is_not_there_is_named(
    measured: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sweeps import FAULTS

    from registry import cli

    [sweep_id] = {record["sweep_id"] for record in measured.records()}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        uri = f"tracking.uri={database(measured.home)}"
        assert cli.main(["report", "arms", f"out={tmp_path / 'told'}", f"sweep={sweep_id},bogus", uri]) == 2
    assert "is of the sweep bogus" in capsys.readouterr().err
    assert not (tmp_path / "told").exists()


def test_a_registration_that_mlflow_lost_is_told_and_imported_again(
    measured: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sweeps import FAULTS

    from registry import cli

    uri, records_folder = f"tracking.uri={database(tmp_path)}", str(measured.folder / "records")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        assert cli.main(["import", records_folder, uri, f"tracking.artifacts={tmp_path}/a"]) == 0
        [artifact] = tmp_path.rglob("registration.json")
        whole = artifact.read_text()
        content = json.loads(whole)
        content["experiment"]["claims"][0]["speedup"] = 1e-9
        fields = {key: value for key, value in content.items() if key in FIELDS}
        content["sha256"] = from_plain(registration.Registration, fields).digest()
        artifact.write_text(json.dumps(content))  # and its hash with it
        assert cli.main(["report", "arms", f"out={tmp_path / 'changed'}", uri]) == 1
        assert "another registration than the one with which the run began" in capsys.readouterr().err
        artifact.unlink()
        assert cli.main(["import", records_folder, uri]) == 0
        assert "0 imported, 1 completed, 4 present" in capsys.readouterr().out
        assert artifact.read_text() == whole
        assert cli.main(["report", "arms", f"out={tmp_path / 'told'}", uri]) == 0


def test_an_imported_sweep_gives_the_same_report(measured: Sweep, tmp_path: Path) -> None:
    """Records of a machine without MLflow: everything is logged later, the registration with its time too."""
    from sweeps import FAULTS

    from registry import cli

    uri = f"tracking.uri={database(tmp_path)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        for told in (5, 0):
            assert (
                cli.main(["import", str(measured.folder / "records"), uri, f"tracking.artifacts={tmp_path}/a"]) == 0
            )
            client = MlflowClient(database(tmp_path))
            runs = client.search_runs([client.get_experiment_by_name("rfloor").experiment_id])
            assert len(runs) == 5, told
        assert cli.main(["report", "arms", f"out={tmp_path / 'told'}", uri]) == 0
    told_later = (tmp_path / "told" / "report.md").read_text()
    verdict, registered = [line.strip("*") for line in told_later.splitlines() if line.startswith("**")]
    assert verdict in measured.stdout
    assert re.search(
        r"on disk only; MLflow's run \w+ was opened .*, later than the first cell began; sha", registered
    )


def test_what_mlflow_does_not_take_of_the_report_is_told_and_counts(start: Start) -> None:
    """Every cell went well; the experiment's own run could not be closed."""
    ended = start("experiment=arms", "backend=spoils-report").end()
    assert {record["outcome"] for record in ended.records()} == {"ok"}
    assert ended.code == 1
    assert "MLflow did not take every run" in ended.stdout
    [sweep_id] = {record["sweep_id"] for record in ended.records()}
    uri = database(ended.home)
    told = f"rfloor import {ended.folder}/records tracking.uri={uri} .*&& rfloor report arms sweep={sweep_id} "
    assert re.search(f"{told}tracking.uri={uri}", ended.stdout)


def test_a_run_whose_artifact_is_no_record_is_left_out_by_name(
    measured: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sweeps import FAULTS

    from registry import cli

    uri = f"tracking.uri={database(tmp_path)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        assert cli.main(["import", str(measured.folder / "records"), uri, f"tracking.artifacts={tmp_path}/a"]) == 0
        [first, second, *_] = sorted(tmp_path.rglob("cell.json"))
        [registered] = tmp_path.rglob("registration.json")
        first.write_text('{"schema_version": 1, "kind": "cell"}')
        second.unlink()
        registered.write_text("[]")
        capsys.readouterr()
        assert cli.main(["report", "arms", f"out={tmp_path / 'told'}", uri]) == 1
        said = capsys.readouterr().err
        for file, why in ((first, "no record_id"), (second, "no such artifact"), (registered, "schema version")):
            [line] = [line for line in said.splitlines() if file.parent.parent.name in line]
            assert why in line
            assert line.startswith("rfloor: no record: run ")
        for file in tmp_path.rglob("cell.json"):
            file.write_text("{")
        assert cli.main(["report", "arms", f"out={tmp_path / 'none'}", uri]) == 2
        assert "4 are no records" in capsys.readouterr().err
    assert (tmp_path / "told" / "report.md").exists()
    assert not (tmp_path / "none").exists()

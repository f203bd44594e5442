"""Whatever is typed and whatever lies on disk is taken or told: no traceback, no hang, nothing changed by a no.

A few hundred cases in the suite, tens of thousands in `make fuzz`. What it found is pinned beside the code it was
found in, or here as an example.
"""

import contextlib
import dataclasses
import json
import os
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import ABOUT, Grammar, as_bytes, bounded, cases, commands, damaged, damaged_bytes, tell
from hypothesis import given
from hypothesis import strategies as st
from planning import H200
from test_checkpoint import FORMS
from test_profile import ONE_PROFILE
from test_record import made_up_record
from test_report import run
from test_weights import check_then_load
from test_weights import saved as saved
from test_weights import small as small

from registry import archive, cli, manifest, registration, resume, status, sweep
from registry import record as records
from registry.architecture import Architecture
from registry.checkpoint import INDEX, CheckpointFormat
from registry.compose import CONF, Composer
from registry.display import notes, results
from registry.experiments import blocks
from registry.export import export
from registry.manifest import Manifest, Planned
from registry.mlflow_client import TrackingDown
from registry.outcome import BadInput, Refused
from registry.plan import Planner
from registry.plugins import Catalog
from registry.record import Record
from registry.registration import Registration
from registry.report.build import SECTIONS, build, write
from registry.report.document import markdown
from registry.report.observation import Observation
from registry.report.terminal import tell_report
from registry.schema import GROUPS, ExperimentConfig, GpuConfig
from registry.sessions import order
from registry.synthesis import write_checkpoint
from registry.weights import RandomWeights, check_weights

SWEEP = "20260701-101010-abcd"
AN_HOUR = 3600
pytestmark = [
    pytest.mark.timeout(AN_HOUR),
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def cwd(home: Path) -> Iterator[Path]:
    """An empty folder to be in, which has to stay empty."""
    folder = home / "cwd"
    folder.mkdir()
    with contextlib.chdir(folder):
        yield folder


def test_what_waits_for_ever_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.WALL_S", 0.2)
    read_end, write_end = os.pipe()
    with pytest.raises(AssertionError, match="in all"), bounded():
        os.read(read_end, 1)
    os.close(read_end)
    os.close(write_end)


# Command lines


@pytest.fixture(scope="module")
def grammar(composer: Composer) -> Grammar:
    plain = dataclasses.asdict(composer.cell(["model=llama-3.1-8b", "quant=nf4", "gpu=l4"]))
    return Grammar({group: composer.options(group) for group in GROUPS}, dict(_leaves(plain)))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        yield prefix + key, value


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep has fewer cells than it may have: ten thousand take a minute to plan."""
    monkeypatch.setattr("registry.axes.MOST", 60)


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and nothing is written where a call says that its records go."""
    monkeypatch.setattr(sweep, "run", lambda *_: pytest.fail("a sweep was begun"))
    monkeypatch.setattr(sweep, "_hold", lambda _: None)


def forget() -> None:
    """Each combination of groups that was ever composed is kept: for one call, and not for thousands."""
    if len(sweep._composer()._composed) > 300:
        sweep._composer.cache_clear()
        sweep._planner.cache_clear()


@cases(80, 3000)
@given(data=st.data())
@pytest.mark.usefixtures("few_cells", "no_worker")
def test_any_command_line_is_planned_or_bad_input(grammar: Grammar, cwd: Path, data: st.DataObject) -> None:
    arguments = [*data.draw(grammar.calls()), *data.draw(st.sampled_from([["dry_run=true"], []]))]
    told = tell(lambda: sweep.prepare(arguments))
    assert list(cwd.iterdir()) == []
    if isinstance(told.code, list):  # Hydra's main would measure, or tell about itself
        assert set(told.code) <= {*arguments}
        return
    assert told.code in (0, 2)
    if told.code == 2:
        assert told.out == ""
        assert told.err.startswith("rfloor: ")
    forget()


@cases(15, 300)
@given(data=st.data())
@pytest.mark.usefixtures("few_cells", "no_worker")
def test_a_call_that_asks_about_rfloor_is_answered_or_bad_input(
    grammar: Grammar, cwd: Path, data: st.DataObject
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    flags = data.draw(st.sampled_from(ABOUT))
    rest = data.draw(st.lists(grammar.plausible() | grammar.override(), max_size=2))
    told = tell(lambda: answered([*flags, *(["-m"] if data.draw(st.booleans()) else []), *rest]))
    GlobalHydra.instance().clear()
    assert told.code in (0, 2, None), told
    assert list(cwd.iterdir()) == []


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the `rfloor` command does is done elsewhere: here it is asked for."""

    def down(*_: object) -> None:
        raise TrackingDown("nobody answers")

    monkeypatch.setattr(cli, "Composer", lambda _: sweep._composer())  # each call's own reads all files anew
    monkeypatch.setattr(cli, "import_records", lambda *_: (Counter(), []))
    monkeypatch.setattr(cli, "write_checkpoint", lambda *_: None)
    monkeypatch.setattr("registry.report.recorded.report", down)


@cases(40, 3000)
@given(data=st.data())
@pytest.mark.usefixtures("few_cells", "no_work")
def test_any_arguments_of_the_command_are_taken_or_told(
    grammar: Grammar, healthy: Path, home: Path, cwd: Path, data: st.DataObject
) -> None:
    arguments = data.draw(commands(grammar, healthy, home / "written"))
    told = tell(lambda: cli.main(arguments))
    assert told.code in (0, 1, 2), told
    if told.code:
        assert "rfloor" in told.err
    assert list(cwd.iterdir()) == []
    shutil.rmtree(home / "written", ignore_errors=True)
    forget()


@pytest.mark.parametrize("command", [["status"], ["import"], ["export", "--study", "x"]])
def test_a_folder_whose_name_is_too_long_is_bad_input(command: list[str], cwd: Path) -> None:
    told = tell(lambda: cli.main([*command, "a" * 300]))
    assert told.code == 2
    assert "is no folder" in told.err


def answered(arguments: list[str]) -> Any:
    """runner.py as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(CONF.parent / "runner.py"), *arguments])
        runpy.run_path(sys.argv[0], run_name="__main__")
    return None


# Records, registrations and manifests


@dataclasses.dataclass(frozen=True)
class Whole:
    """Good files, by their places under a folder of records; never changed."""

    records: dict[str, dict[str, Any]]
    registration: dict[str, Any]
    manifest: dict[str, Any]


@pytest.fixture(scope="module")
def whole(composer: Composer, profiles: dict[str, GpuConfig]) -> Whole:
    """Two arms in two sessions, one of them profiled, a kernel alone, a cell that was refused, and what was said of
    them beforehand.
    """
    planner = Planner(composer.catalog, profiles, H200)
    call = ["experiment=graphs_ab", "model=tiny", "context=2048", "protocol.sessions=2"]
    asked = composer.jobs(call, multirun=True)
    cells = [planner.plan(composer.cell(job)) for job in asked]
    ordered = [(session, cells[place]) for session, place in order(blocks(asked, cells), 2, 0)]
    [one] = registration.register(SWEEP, ordered, 0)
    one.registered_at = "2026-07-01T09:00:00.000+00:00"
    for claim in one.experiment.claims:
        claim.where = {**claim.where, "model.name": "tiny"}
    one.sha256 = one.digest()
    found = [
        run(cell, n, 14.0 + n, session=session, experiment="graphs_ab", registration=one.sha256, cell_id=cell.cell_id)
        for n, (session, cell) in enumerate(ordered)
    ]
    found[0].record.measured = {"profile": ONE_PROFILE}
    kernel = planner.plan(composer.cell(["model=tiny", "gpu=h200", "protocol=attention"]))
    found.append(run(kernel, 5, 2.0, kind="attention", step_times_ms=[], measured={"sdp_enabled": {"flash": True}}))
    found[-1].record.metrics = {"median_call_us": 20.0, "call_bytes": 7.0}
    found[-1].record.call_times_us = [20.0, 21.0]
    content = [one.record for one in found]
    content.append(made_up_record(config=content[0].config, index=6, registration="", warnings=["unsteady"]))
    jobs = [Planned(r.index, r.cell_id, r.session, r.experiment, r.label) for r in content]
    plain = {"schema_version": 1, "kind": manifest.KIND} | dataclasses.asdict(
        Manifest(SWEEP, one.registered_at, jobs)
    )
    by_place = {f"{r.cell_id}/{SWEEP}-{r.index}.json": {**r.plain(), "sweep_id": SWEEP} for r in content}
    return Whole(by_place, one.plain(), plain)


@pytest.fixture(scope="module")
def healthy(whole: Whole, home: Path) -> Path:
    folder = home / "healthy"
    contents = {**whole.records, f"sweeps/{SWEEP}.json": whole.manifest}
    contents[f"experiments/{SWEEP}-graphs_ab.json"] = whole.registration
    for place, content in contents.items():
        records.write_json(folder / place, content)
    return folder


@pytest.fixture(scope="module")
def everything(composer: Composer) -> ExperimentConfig:
    """An experiment whose report has every section."""
    found = composer.cell(["experiment=graphs_ab"]).experiment
    return dataclasses.replace(found, report=list(SECTIONS))


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """Other content in a file, until the case is over."""
    kept = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(kept)


def seen(folder: Path, everything: ExperimentConfig, target: Path, drawn: bool) -> None:
    """Look at a folder of records in every way that rfloor has, but for MLflow."""
    found, problems = archive.everything_in(folder)
    assert all(isinstance(line, str) for line in problems)
    for _, one in found:
        if isinstance(one, Registration):
            assert one.tags()
    complete, _ = archive.records_in(folder)
    registered = [one for _, one in found if isinstance(one, Registration)]
    told(folder)
    with contextlib.suppress(OSError):
        for shape in ("pairs", "stack", "profile"):
            export(complete, {everything.name: dataclasses.replace(everything, study_files=shape)}, target)
    tell(lambda: reported(everything, complete, registered, target, drawn))
    shutil.rmtree(target, ignore_errors=True)


def told(folder: Path) -> None:
    """How far the sweeps of a folder are."""
    known, _ = status.statuses(folder)
    assert tell(lambda: cli.main(["status", str(folder)])).code in (0, 1)
    for one in known:
        if one.sweep_id and not one.sweep_id.startswith("-"):
            assert tell(lambda one=one: cli.main(["status", str(folder), one.sweep_id])).code in (0, 1)


def reported(
    experiment: ExperimentConfig, found: list[Record], registered: list[Registration], target: Path, drawn: bool
) -> None:
    """Tell of records on a terminal, in Markdown and on a page."""
    if not found:
        return
    results(found, 200)
    notes(found)
    report = build(experiment, [Observation(one, one.record_id) for one in found], registered)
    tell_report(report, write(report, target / "report") if drawn else [])
    markdown(report)


@cases(40, 2000)
@given(data=st.data())
def test_a_damaged_record_is_told_or_left_out(
    whole: Whole, healthy: Path, home: Path, everything: ExperimentConfig, data: st.DataObject
) -> None:
    place = data.draw(st.sampled_from(sorted(whole.records)))
    content = as_bytes(data, damaged(data, whole.records[place]), indent=1) + b"\n"
    with replaced(healthy / place, content), bounded():
        seen(healthy, everything, home / "out", drawn=data.draw(st.integers(0, 9)) == 0)


@cases(20, 600)
@given(data=st.data())
def test_a_damaged_registration_is_told_or_left_out(
    whole: Whole, healthy: Path, home: Path, everything: ExperimentConfig, data: st.DataObject
) -> None:
    plain = damaged(data, whole.registration)
    if isinstance(plain, dict) and data.draw(st.booleans()):  # whoever changes it may hash it again
        with contextlib.suppress(ValueError):
            own = {key: value for key, value in plain.items() if key not in ("schema_version", "kind")}
            plain["sha256"] = registration._digest(own)
    with replaced(healthy / "experiments" / f"{SWEEP}-graphs_ab.json", as_bytes(data, plain)), bounded():
        seen(healthy, everything, home / "out", drawn=False)
        with contextlib.suppress(BadInput):
            registration.check_claims(SWEEP, everything, healthy)


@cases(40, 2500)
@given(data=st.data())
def test_a_damaged_manifest_is_told_or_left_out(whole: Whole, healthy: Path, data: st.DataObject) -> None:
    jobs = [(r["cell_id"], r["session"], r["experiment"]) for r in whole.records.values()]
    changed = damaged(data, whole.manifest)
    with contextlib.suppress(TypeError, KeyError, IndexError):  # whatever is left of it
        if data.draw(st.booleans()):
            changed["jobs"][0]["index"] = data.draw(st.sampled_from([-1, 2**31 - 1, 2**31, 2**63]))
    content = as_bytes(data, changed)
    with replaced(healthy / "sweeps" / f"{SWEEP}.json", content), bounded():
        told(healthy)
        unknown = ("f" * 16, 0, "")
        before = resume.look([*jobs, unknown], healthy, data.draw(st.booleans()))
        assert len(before.places) == len(jobs) + 1
        manifest.extended(healthy, before.sweep_id or SWEEP, [Planned(0, *jobs[0], "x")])
        archive.everything_in(healthy)


@cases(2, 40)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_record_is_imported_or_told(whole: Whole, healthy: Path, home: Path, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(sorted(whole.records)))
    given_to = [f"tracking.uri=sqlite:///{home}/mlflow.db", f"tracking.artifacts={home}/artifacts"]
    content = damaged(data, {**whole.records[place], "record_id": str(data.draw(st.uuids()))})
    with replaced(healthy / place, as_bytes(data, content)):
        assert tell(lambda: cli.main(["import", str(healthy), *given_to])).code in (0, 1)


# Configuration


YAML_FILES = {
    "experiment/odd.yaml": yaml.safe_load((CONF / "experiment" / "graphs_ab.yaml").read_text()) | {"name": "odd"},
    "quant/odd.yaml": yaml.safe_load((CONF / "quant" / "nf4.yaml").read_text()),
    "model/odd.yaml": yaml.safe_load((CONF / "model" / "llama-3.1-8b.yaml").read_text()),
    "gpu/odd.yaml": yaml.safe_load((CONF / "gpu" / "l4.yaml").read_text()),
}


@pytest.fixture(scope="module")
def brought(home: Path, composer: Composer) -> Path:
    """A folder for YAML files; `composer` has filled Hydra's store before."""
    for file in YAML_FILES:
        (home / "conf" / file).parent.mkdir(parents=True)
    return home / "conf"


@cases(20, 700)
@given(data=st.data())
@pytest.mark.usefixtures("few_cells")
def test_a_damaged_option_is_composed_or_bad_input(
    brought: Path, cwd: Path, profiles: dict[str, GpuConfig], data: st.DataObject
) -> None:
    place = data.draw(st.sampled_from(sorted(YAML_FILES)))
    (brought / place).write_bytes(as_yaml(data, damaged(data, YAML_FILES[place])))
    group = place.partition("/")[0]
    chosen = [f"{group}=odd", *(text for text in ("model=tiny", "gpu=l4") if not text.startswith(group))]
    with bounded(), pytest.MonkeyPatch.context() as patch, contextlib.suppress(BadInput):
        patch.setattr(Catalog, "conf_folders", lambda _: [brought])  # which is searched behind rfloor's own
        stranger = Composer(Catalog())
        planner = Planner(stranger.catalog, profiles, H200)
        for job in stranger.jobs(chosen, multirun=True):
            planner.plan(stranger.cell(job))
    (brought / place).unlink()
    assert list(cwd.iterdir()) == []


def as_yaml(data: st.DataObject, content: Any) -> bytes:
    """A value as a YAML file's bytes, in some cases damaged once more."""
    text = yaml.safe_dump(content, allow_unicode=data.draw(st.booleans()), sort_keys=False)
    whole = text.encode(errors="surrogatepass")
    return damaged_bytes(data, whole) if data.draw(st.integers(0, 3)) == 0 else whole


# Folders of weights


@pytest.fixture(scope="module")
def victim(saved: Path, home: Path) -> Path:
    return shutil.copytree(saved, home / "victim")


@cases(50, 2000)
@given(data=st.data())
def test_a_damaged_model_folder_loads_or_is_bad_input(victim: Path, small: Architecture, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(["config", "header", "header", "index"]))
    tensors = victim / "model.safetensors"
    if part == "config":
        file, content = victim / "config.json", json.loads((victim / "config.json").read_text())
        changed = as_bytes(data, damaged(data, content))
    elif part == "header":
        file, changed = tensors, with_damaged_header(data, tensors.read_bytes())
    else:
        file = victim / INDEX
        names = list(json.loads(tensors.read_bytes()[8:][: int.from_bytes(tensors.read_bytes()[:8], "little")]))
        file.write_text("{}")
        changed = as_bytes(data, damaged(data, {"metadata": {}, "weight_map": dict.fromkeys(names, tensors.name)}))
    with replaced(file, changed), bounded():
        check_then_load(victim, small)
    (victim / INDEX).unlink(missing_ok=True)


def with_damaged_header(data: st.DataObject, whole: bytes) -> bytes:
    """A safetensors file whose length, header or tensors are not what they were."""
    start = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        return damaged_bytes(data, whole[: start + 64])
    header = as_bytes(data, damaged(data, json.loads(whole[8:start])))
    length = len(header) if data.draw(st.integers(0, 4)) else data.draw(st.integers(0, 2**64 - 1))
    return length.to_bytes(8, "little") + header + whole[start:]


@pytest.fixture(scope="module")
def quantised(home: Path, small: Architecture) -> dict[str, Path]:
    """A folder in each format that rfloor writes."""
    for name, form in FORMS.items():
        write_checkpoint(home / name, small, RandomWeights(3), form(), "cpu", lambda _: None)
    return {name: home / name for name in FORMS}


@cases(30, 1500)
@given(data=st.data())
def test_a_damaged_quantised_folder_is_taken_or_bad_input(
    quantised: dict[str, Path], small: Architecture, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(FORMS)))
    files = [file for file in sorted(quantised[name].iterdir()) if file.suffix == ".json"]
    file = data.draw(st.sampled_from(files))
    content = as_bytes(data, damaged(data, json.loads(file.read_text())))
    form: CheckpointFormat = FORMS[name]()
    with replaced(file, content), bounded(), contextlib.suppress(BadInput, Refused):
        check_weights(str(quantised[name]), small, form)

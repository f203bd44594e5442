"""Sweeps that were cut short, and taken up again."""

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from sweeps import PATIENCE_S, Start, Sweep, assert_logged, assert_nothing_left, database, marked, wait_for
from test_record import made_up_record

from registry import cli, sweep
from registry import manifest as manifests
from registry import record as records
from registry.compose import Composer
from registry.manifest import Manifest, Planned
from registry.outcome import Outcome
from registry.resume import look
from registry.status import statuses as statuses_of

pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")  # sqlalchemy on MLflow

A, B, C = (letter * 16 for letter in "abc")
OLD, NEW = "20260701-101010-abcd", "20260702-101010-abcd"


def kept(folder: Path, cell_id: str, sweep_id: str = OLD, index: int = 0, **changes: object) -> records.Record:
    """A record on disk; ok unless it is said otherwise."""
    given = {"outcome": Outcome.OK, "reason": "", "remedy": "", "step_times_ms": [1.0]}
    given |= {"record_id": f"{cell_id}-{sweep_id}-{index}", **changes}
    record = made_up_record(cell_id=cell_id, sweep_id=sweep_id, index=index, **given)
    records.write(record, folder)
    return record


def begun(folder: Path, sweep_id: str, *cells: str, sessions: int = 1) -> None:
    """The manifest of a sweep of these cells."""
    jobs = [(session, cell) for session in range(sessions) for cell in cells]
    planned = [Planned(place, cell, session, "", cell) for place, (session, cell) in enumerate(jobs)]
    held = manifests.hold(folder, sweep_id, lambda: Manifest(sweep_id, "2026-07-01T10:10:10+00:00", planned))
    assert held
    held.close()


# What is left


def test_only_what_has_no_ok_record_is_left(tmp_path: Path) -> None:
    kept(tmp_path, A)
    kept(tmp_path, B, outcome=Outcome.CRASH, reason="broken", step_times_ms=[])
    before = look([(A, 0, ""), (B, 0, ""), (C, 0, "")], tmp_path, profiled=False)
    assert before.sweep_id == OLD
    assert [*before.found] == [0]
    assert before.found[0].cell_id == A


def test_where_nothing_was_begun_nothing_goes_on(tmp_path: Path) -> None:
    kept(tmp_path, C)
    before = look([(A, 0, ""), (B, 0, "")], tmp_path, profiled=False)
    assert (before.sweep_id, before.found, before.places) == ("", {}, [0, 1])


def test_a_sweep_that_was_killed_in_its_first_cell_keeps_its_name_and_places(tmp_path: Path) -> None:
    begun(tmp_path, OLD, A, B, sessions=2)
    before = look([(B, 1, ""), (A, 0, ""), (C, 0, "")], tmp_path, profiled=False)
    assert before.sweep_id == OLD
    assert before.places == [3, 0, 4]


def test_the_sweep_that_goes_on_is_the_one_that_shares_most(tmp_path: Path) -> None:
    begun(tmp_path, OLD, A, B, C)
    kept(tmp_path, A, OLD, 0)
    begun(tmp_path, NEW, B)
    kept(tmp_path, B, NEW, 0)
    before = look([(A, 0, ""), (B, 0, ""), (C, 0, "")], tmp_path, profiled=False)
    assert before.sweep_id == OLD
    assert {place: record.sweep_id for place, record in before.found.items()} == {0: OLD, 1: NEW}
    begun(tmp_path, NEW, A, B, C)
    assert look([(A, 0, ""), (B, 0, ""), (C, 0, "")], tmp_path, profiled=False).sweep_id == NEW


def test_sessions_and_experiments_are_told_apart(tmp_path: Path) -> None:
    kept(tmp_path, A, index=0, session=1)
    kept(tmp_path, A, index=1, experiment="arms")
    jobs = [(A, 0, ""), (A, 1, ""), (A, 0, "arms"), (A, 1, "arms")]
    assert [*look(jobs, tmp_path, profiled=False).found] == [1, 2]


def test_a_sweep_of_another_experiment_does_not_go_on(tmp_path: Path) -> None:
    """It measured the same cell, for a question of its own."""
    kept(tmp_path, A, experiment="stack")
    kept(tmp_path, A, NEW)
    assert look([(A, 0, "batch4"), (B, 0, "batch4")], tmp_path, profiled=False).sweep_id == ""


def test_a_cell_that_is_asked_for_twice_needs_two_records(tmp_path: Path) -> None:
    kept(tmp_path, A)
    assert [*look([(A, 0, ""), (A, 0, "")], tmp_path, profiled=False).found] == [0]
    kept(tmp_path, A, index=1)
    assert [*look([(A, 0, ""), (A, 0, "")], tmp_path, profiled=False).found] == [0, 1]


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
def test_status_counts_records_of_one_identity_as_resume_does(tmp_path: Path, places: tuple[int, ...]) -> None:
    """As `context=64,64` asks for, or `gpu=auto,cpu` where there is no GPU."""
    begun(tmp_path, OLD, A, A)
    for place in places:
        kept(tmp_path, A, index=place)
    assert [*look([(A, 0, "")] * 2, tmp_path, profiled=False).found] == [*places]
    [one], _ = statuses_of(tmp_path)
    left = [place for place in (0, 1) if place not in places]
    assert (one.done, [job.index for job in one.missing], one.failed) == (len(places), left, [])
    assert one.state == ("cut short" if left else "ended")


def test_a_sweep_that_another_call_began_says_what_it_shares(tmp_path: Path, composer: Composer) -> None:
    call = ["-m", "model=tiny", "gpu=cpu", "context=32", f"records={tmp_path}"]
    begun = sweep.preflight(sweep._parse([*call, "protocol.seed=1,2"]), composer)
    sweep._hold(begun)
    begun.held.close()
    for job in begun.jobs:
        kept(tmp_path, job.cell.cell_id, begun.sweep_id, job.index)
    same = sweep.preflight(sweep._parse([*call, "protocol.seed=1,2", "resume=true"]), composer)
    assert same.resumed == f"{begun.sweep_id} goes on: 2 of 2 are measured"
    other = sweep.preflight(sweep._parse([*call, "protocol.seed=2,7,8", "resume=true"]), composer)
    shares = "1 of 3 are measured; it has 1 of this call's 3, and 1 that this call has not"
    assert other.resumed == f"{begun.sweep_id} goes on: {shares}"
    sweep._hold(other)
    with other.held:
        assert other.resumed.endswith(shares)


def test_what_is_left_is_told_so_that_no_two_cells_look_alike(
    tmp_path: Path, composer: Composer, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["-m", "model=tiny", "gpu=cpu", "protocol.seed=1,2", "context=32,64", f"records={tmp_path}"]
    call += ["protocol.sessions=2", "quant.study_bits=8"]
    begun = sweep.preflight(sweep._parse(call), composer)
    sweep._hold(begun)
    begun.held.close()
    first = begun.jobs[0]
    kept(tmp_path, first.cell.cell_id, begun.sweep_id, session=first.session, outcome=Outcome.CRASH)
    assert cli.main(["status", str(tmp_path), begun.sweep_id]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " place " in line]
    assert len({line.partition(" session ")[2] for line in lines}) == len(lines) == 8
    seed, session = first.cell.config.protocol.seed, first.session
    crash = f"crash place 0 session {session} {first.cell.label} protocol.seed={seed}: {tmp_path}"
    assert lines[0].startswith(crash)
    assert all("study_bits" not in line for line in lines)


def test_a_copy_of_a_record_answers_no_second_cell(tmp_path: Path) -> None:
    begun(tmp_path, OLD, A, A)
    kept(tmp_path, A)
    file = records.path(tmp_path, A, OLD, 0)
    file.with_name("copy.json").write_bytes(file.read_bytes())
    file.with_name("other.json").write_text(file.read_text().replace('"index": 0', '"index": 1'))
    assert len(look([(A, 0, "")] * 2, tmp_path, profiled=False).found) == 1
    [one], _ = statuses_of(tmp_path)
    assert (one.done, len(one.missing), one.failed) == (1, 1, [])


@pytest.mark.parametrize("planned", [True, False])
def test_an_attempt_that_failed_takes_back_no_record(tmp_path: Path, planned: bool) -> None:
    """As with one whose profile was asked for later."""
    if planned:
        begun(tmp_path, OLD, A)
    kept(tmp_path, A)
    kept(tmp_path, A, record_id="second", attempt=2, outcome=Outcome.CRASH, reason="broken", step_times_ms=[])
    assert [*look([(A, 0, "")], tmp_path, profiled=False).found] == [0]
    [one], _ = statuses_of(tmp_path)
    assert (one.done, one.failed, one.missing, one.state) == (1, [], [], "ended")


def test_a_record_without_the_profile_that_is_asked_for_is_not_enough(tmp_path: Path) -> None:
    kept(tmp_path, A)
    assert look([(A, 0, "")], tmp_path, profiled=True).found == {}
    kept(tmp_path, A, index=1, measured={"profile": {}})
    assert [*look([(A, 0, "")], tmp_path, profiled=True).found] == [0]


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"\xff", b'{"schema_version": 99}'])
def test_a_damaged_record_is_named_and_measured_again(tmp_path: Path, damage: bytes) -> None:
    file = records.write(kept(tmp_path, A), tmp_path)
    file.write_bytes(damage)
    begun(tmp_path, OLD, A)
    before = look([(A, 0, "")], tmp_path, profiled=False)
    assert before.sweep_id == OLD
    assert before.found == {}
    [problem] = before.problems
    assert problem.startswith(f"{file}: ")
    assert records.next_attempt(tmp_path, A, OLD, 0) == 2


# The manifest


DAMAGED_MANIFESTS: dict[str, dict[str, Any]] = {
    "another sweep's": {"sweep_id": NEW},
    "no name": {"sweep_id": {"a": 1}},
    "no time": {"started_at": [1]},
    "no jobs": {"jobs": None},
    "a text for a job": {"jobs": ["x"]},
    "a place that is none": {"jobs": [{"index": None, "cell_id": A, "session": 0, "experiment": "", "label": ""}]},
    "a place below all": {"jobs": [{"index": -1, "cell_id": A, "session": 0, "experiment": "", "label": ""}]},
    "a place beyond all": {"jobs": [{"index": 2**31, "cell_id": A, "session": 0, "experiment": "", "label": ""}]},
    "an identity that is none": {"jobs": [{"index": 0, "cell_id": [], "session": 0, "experiment": "", "label": ""}]},
}


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS)
def test_a_manifest_of_the_wrong_types_is_none(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path, OLD, A)
    file = manifests.path(tmp_path, OLD)
    file.write_text(json.dumps(json.loads(file.read_text()) | DAMAGED_MANIFESTS[damage]))
    with pytest.raises(records.BadRecord, match=str(file)):
        manifests.read(file)
    assert look([(A, 0, "")], tmp_path, profiled=False).sweep_id == ""
    assert cli.main(["status", str(tmp_path)]) == 0
    assert OLD not in capsys.readouterr().out


def test_what_is_new_to_a_sweep_with_a_place_beyond_all_has_a_place_too(tmp_path: Path) -> None:
    begun(tmp_path, OLD, A)
    file = manifests.path(tmp_path, OLD)
    file.write_text(file.read_text().replace('"index": 0', f'"index": {2**31 - 1}'))
    assert look([(A, 0, ""), (B, 0, "")], tmp_path, profiled=False).places == [2**31 - 1, 1]


def test_a_manifest_without_jobs_goes_on_with_the_first_place(tmp_path: Path) -> None:
    begun(tmp_path, OLD)
    kept(tmp_path, A, OLD)
    assert look([(A, 0, ""), (B, 0, "")], tmp_path, profiled=False).places == [0, 1]


def test_a_sweep_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    plan = Manifest(OLD, "2026-07-01T10:10:10+00:00", [Planned(0, A, 0, "", "a")])
    held = manifests.hold(tmp_path, OLD, lambda: plan)
    assert held
    assert manifests.is_held(tmp_path, OLD)
    assert manifests.hold(tmp_path, OLD, lambda: plan) is None
    held.close()
    assert not manifests.is_held(tmp_path, OLD)
    again = manifests.extended(tmp_path, OLD, [Planned(1, B, 0, "", "b")])
    assert [job.cell_id for job in again.jobs] == [A, B]
    assert again.started_at == plan.started_at


def test_what_another_process_measured_until_the_sweep_is_held_is_not_measured_again(
    tmp_path: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["-m", "model=tiny", "gpu=cpu", "context=32,64,96", "resume=true", f"records={tmp_path}"]
    first = sweep.preflight(sweep._parse(call), composer)
    sweep._hold(first)
    first.held.close()

    def measured(place: int) -> None:
        kept(tmp_path, first.jobs[place].cell.cell_id, first.sweep_id, place)

    measured(0)
    again = sweep.preflight(sweep._parse(call), composer)
    assert (again.sweep_id, len(again.left)) == (first.sweep_id, 2)
    joined = manifests._joined
    monkeypatch.setattr(manifests, "_joined", lambda *args: (measured(1), joined(*args))[1])
    sweep._hold(again)
    with again.held:
        assert [job.index for job in again.left] == [2]
        assert "2 of 3 are measured" in again.resumed
    assert [job.index for job in manifests.read(manifests.path(tmp_path, first.sweep_id)).jobs] == [0, 1, 2]


# Records by their beginnings


@pytest.mark.parametrize("earlier", [False, True])
def test_a_head_is_what_the_record_says(tmp_path: Path, earlier: bool) -> None:
    record = kept(tmp_path, A, label="x" * 300, session=3, step_times_ms=[1.5] * 2000)
    file = records.path(tmp_path, A, OLD, 0)
    if earlier:  # another order, and without what records have had since
        content = {key: value for key, value in json.loads(file.read_text()).items() if key != "attempt"}
        file.write_text(json.dumps(dict(reversed(content.items())), indent=1))
    assert records.head(file) == records.Head(**{f.name: getattr(record, f.name) for f in fields(records.Head)})


@pytest.mark.parametrize("cut", [0, 10, 3000, 5000, -3])
def test_a_head_of_a_cut_record_is_none(tmp_path: Path, cut: int) -> None:
    kept(tmp_path, A, step_times_ms=[1.5] * 2000)
    file = records.path(tmp_path, A, OLD, 0)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(records.BadRecord, match=str(file)):
        records.head(file)


@pytest.mark.parametrize("damage", [b"\0" * 800, b"\0", b"\xff"])
def test_status_and_resume_agree_on_a_record_that_is_damaged_within(tmp_path: Path, damage: bytes) -> None:
    """A crash of the machine leaves zeros of a block that was never written."""
    begun(tmp_path, OLD, A, B)
    for place, cell in enumerate((A, B)):
        kept(tmp_path, cell, index=place, step_times_ms=[1.5] * 2000)
    file = records.path(tmp_path, B, OLD, 1)
    whole = file.read_bytes()
    file.write_bytes(whole[:3000] + damage + whole[3000 + len(damage) :])
    assert [*look([(A, 0, ""), (B, 0, "")], tmp_path, profiled=False).found] == [0]
    [one], [problem] = statuses_of(tmp_path)
    assert (one.done, [job.cell_id for job in one.missing]) == (1, [B])
    assert str(file) in problem


# Whole sweeps


def until_all_are_gone(sweep: Sweep) -> None:
    end = time.monotonic() + 10
    while left := list(marked(sweep.mark)):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def statuses(sweep: Sweep) -> Counter[tuple[str, str]]:
    """Status and outcome of the sweep's runs in MLflow."""
    client = MlflowClient(database(sweep.home))
    [sweep_id] = {file.stem for file in sweep.folder.glob("records/sweeps/*.json")}
    found = client.search_runs(
        [client.get_experiment_by_name("rfloor").experiment_id], f"tags.sweep_id = '{sweep_id}'"
    )
    return Counter((run.info.status, run.data.tags.get("outcome", "")) for run in found)


def test_a_killed_sweep_goes_on_where_it_was(start: Start) -> None:
    call = ("backend=hf,waits", "attention=sdpa,sdpa-math")
    killed = start(*call)
    killed.until_it_hangs()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()
    until_all_are_gone(killed)
    before = {record["record_id"] for record in killed.records()}
    assert len(before) == 2
    assert statuses(killed) == {("FINISHED", "ok"): 2, ("RUNNING", ""): 1}
    (killed.folder / "go").touch()
    ended = start(*call, "resume=true", after=killed).end()
    assert ended.code == 0, ended.stderr
    assert "2 of 4 are measured" in ended.stdout
    found = ended.records()
    assert [record["outcome"] for record in found] == ["ok"] * 4
    assert [record["index"] for record in found] == [0, 1, 2, 3]
    assert len({record["sweep_id"] for record in found}) == 1
    assert before < {record["record_id"] for record in found}
    assert [record["attempt"] for record in found] == [1, 1, 2, 1]  # of the first at 2 there is a log
    assert statuses(ended) == {("FINISHED", "ok"): 4, ("KILLED", ""): 1}
    assert ended.left_processes == []
    again = start(*call, "resume=true", after=ended).end()
    assert again.code == 0
    assert "4 of 4 are measured" in again.stdout
    assert again.records() == found


def test_what_a_killed_sweep_has_measured_and_not_logged_is_logged(start: Start) -> None:
    """It is killed between a record and the end of its run, in which a locked store holds it up."""
    killed = start("backend=waits")
    killed.until_it_hangs()
    with contextlib.closing(sqlite3.connect(killed.home / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        (killed.folder / "go").touch()
        wait_for(lambda: killed.written(), "no record")
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.end()
    assert statuses(killed) == {("RUNNING", ""): 1}
    for _ in range(2):
        again = start("backend=waits", "resume=true", after=killed).end()
        assert again.code == 0, again.stderr
        assert "1 of 1 are measured" in again.stdout
        [record] = again.records()
        assert record["outcome"] == "ok"
        assert_logged(again, record)
        assert statuses(again) == {("FINISHED", "ok"): 1}


def test_what_failed_is_tried_again_and_the_last_attempt_counts(start: Start) -> None:
    failed = start("backend=fails-first").end()
    assert failed.code == 1
    [first] = failed.records()
    (failed.folder / "go").touch()
    ended = start("backend=fails-first", "resume=true", after=failed).end()
    assert ended.code == 0, ended.stderr
    assert sorted((r["attempt"], r["outcome"]) for r in ended.records()) == [(1, "crash"), (2, "ok")]
    assert first in ended.records()
    assert statuses(ended) == {("FAILED", "crash"): 1, ("FINISHED", "ok"): 1}
    assert_nothing_left(ended)


def test_a_sweep_that_runs_is_left_alone(start: Start) -> None:
    """Neither is it taken up a second time, nor does another call end its runs."""
    running = start("backend=waits")
    running.until_it_hangs()
    refused = start("backend=waits", "resume=true", after=running)
    said = refused.process.communicate(timeout=PATIENCE_S)
    assert refused.process.returncode == 2
    assert "another process measures the sweep" in said[1]
    start("backend=hf").end()
    assert statuses(running) == {("RUNNING", ""): 1}
    (running.folder / "go").touch()
    assert running.end().code == 0
    assert statuses(running) == {("FINISHED", "ok"): 1}


def test_a_dry_run_tells_what_is_left(start: Start) -> None:
    failed = start("backend=hf,fails-first").end()
    files = sorted(failed.folder.rglob("records/**/*"))
    told = start("backend=hf,fails-first", "resume=true", "dry_run=true", after=failed).end()
    assert told.code == 0
    assert "1 of 2 are measured" in told.stdout
    assert sorted(failed.folder.rglob("records/**/*")) == files

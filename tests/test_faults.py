"""What cannot be done for real without harm, at the points that `registry.faults` names."""

import errno
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from sweeps import Start, Sweep, assert_logged, assert_nothing_left, database, words

from registry import cli, faults
from registry import record as records
from registry.status import statuses

pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

SMALL = ("protocol.warmup_steps=1", "protocol.measured_steps=3")


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.disk(faults.RECORD_FULL)
    first = faults.now()
    assert all(first <= faults.now() for _ in range(4))


@pytest.mark.parametrize(("point", "hours"), [(faults.CLOCK_BACK, -1), (faults.CLOCK_FORWARD, 1)])
def test_the_clock_jumps_to_and_fro(monkeypatch: pytest.MonkeyPatch, point: str, hours: int) -> None:
    monkeypatch.setenv(faults.VARIABLE, point)
    monkeypatch.setattr(faults, "_asked", 0)
    first, second, third = (faults.now() for _ in range(3))
    assert round((second - first) / faults.JUMP) == hours
    assert round((third - first) / faults.JUMP) == 0


def test_a_point_fails_as_a_full_disk_does_and_no_other_point_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, faults.RECORD_FULL)
    faults.disk(faults.MLFLOW_FULL)
    with pytest.raises(OSError, match="No space left") as caught:
        faults.disk(faults.RECORD_FULL)
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_full_at_the_record_stops_the_sweep_which_goes_on_once_there_is_room(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, faults.RECORD_FULL)
    full = start("protocol.seed=1,2,3", *SMALL).end()
    assert full.code == 1
    assert "Traceback" not in full.stdout + full.stderr
    told = words(full.stdout)
    assert "its record cannot be written: [Errno 28] No space left on device" in told
    assert "the same call with resume=true then goes on" in told
    assert told.count("the sweep was interrupted before this cell") == 1  # one note for two cells
    assert full.written() == []

    [status], _ = statuses(full.folder / "records")
    assert (status.done, len(status.missing), status.state) == (0, 3, "cut short")
    runs = own_runs(full, status.sweep_id)
    assert sorted(run.data.tags["outcome"] for run in runs) == ["crash", "interrupted", "interrupted"]
    assert not any(run.data.metrics for run in runs), "figures that no record proves"
    assert {run.info.status for run in runs} == {"FAILED", "KILLED"}

    monkeypatch.delenv(faults.VARIABLE)
    again = start("protocol.seed=1,2,3", *SMALL, "resume=true", after=full).end()
    assert again.code == 0, again.stderr
    found = again.records()
    assert [(record["outcome"], record["sweep_id"]) for record in found] == [("ok", status.sweep_id)] * 3
    assert len(own_runs(full, status.sweep_id)) == 6
    assert_nothing_left(again)


def test_a_disk_full_at_the_worker_s_answer_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, faults.ANSWER_FULL)
    sweep = start(*SMALL).end()
    assert sweep.code == 1
    [record] = sweep.records()
    assert record["outcome"] == "crash"
    assert record["reason"].startswith("what the worker found could not be written")
    assert "[Errno 28] No space left on device" in record["reason"]
    assert record["remedy"] == f"Make room in {sweep.folder}/tmp, or set TMPDIR to a folder that has it"
    assert_logged(sweep, record)
    assert_nothing_left(sweep)


def own_runs(sweep: Sweep, sweep_id: str) -> list[Run]:
    return list(MlflowClient(database(sweep.home)).search_runs(["1"], f"tags.sweep_id = '{sweep_id}'"))


def test_a_disk_full_at_mlflow_costs_no_record(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, faults.MLFLOW_FULL)
    sweep = start(*SMALL).end()
    assert sweep.code == 1
    assert "MLflow did not take every run ([Errno 28] No space left on device). Once it does: rfloor import" in words(
        sweep.stdout
    )
    assert [record["outcome"] for record in sweep.records()] == ["ok"]
    still = start(*SMALL, "resume=true", after=sweep).end()
    assert still.code == 1
    assert "Once it does: rfloor import" in words(still.stdout)
    monkeypatch.delenv(faults.VARIABLE)
    store = [f"tracking.uri=sqlite:///{sweep.folder}/late.db", f"tracking.artifacts={sweep.folder}/artifacts"]
    assert cli.main(["import", str(sweep.folder / "records"), *store]) == 0
    for _ in range(2):
        again = start(*SMALL, "resume=true", after=sweep).end()
        assert again.code == 0, again.stderr
        assert "1 of 1 are measured" in again.stdout
        [record] = again.records()
        assert_logged(again, record)


@pytest.mark.parametrize("point", [faults.CLOCK_BACK, faults.CLOCK_FORWARD])
def test_a_clock_that_jumps_loses_no_cell_and_no_second(
    start: Start, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Every other look at it finds it an hour off: of the two cells one begins an hour before the other."""
    monkeypatch.setenv(faults.VARIABLE, point)
    sweep = start("protocol.seed=1,2", *SMALL).end()
    assert sweep.code == 0, sweep.stderr
    found = sweep.records()
    assert [record["outcome"] for record in found] == ["ok", "ok"]
    assert {record["started_at"][:13] for record in found} != {found[0]["started_at"][:13]}
    assert all(1 < record["wall_s"] < 600 for record in found)
    for run in sweep.runs().values():
        assert run.info.end_time - run.info.start_time > 0
        assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "ok")
    monkeypatch.delenv(faults.VARIABLE)
    again = start("protocol.seed=1,2", *SMALL, "resume=true", after=sweep).end()
    assert (again.code, len(again.records())) == (0, 2)
    assert "goes on: 2 of 2 are measured" in words(again.stdout)


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1, "record_id": "cut', b"\x00" * 4096, b"[]", b"\xff"])
def test_a_corrupt_record_costs_no_other_and_its_cell_is_missing(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_record import made_up_record

    good = records.write(made_up_record(), tmp_path / "records")
    before = good.read_bytes()
    bad = good.with_name("20260701-101010-abcd-1.json")
    bad.write_bytes(content)
    store = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts"]
    assert cli.main(["import", str(tmp_path / "records"), *store]) == 1
    told = capsys.readouterr()
    assert "1 imported" in told.out
    assert str(bad) in told.out + told.err
    assert bad.read_bytes() == content
    assert good.read_bytes() == before

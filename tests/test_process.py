"""Whether a process has ended, told from outside."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from registry import process
from registry.process import has_ended, this_process

TELL = "import sys; from registry.process import this_process; print(this_process(), flush=True); sys.stdin.read()"


def test_a_process_has_not_ended_until_it_has() -> None:
    assert not has_ended(this_process())
    with subprocess.Popen([sys.executable, "-c", TELL], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        told = child.stdout.readline()
        assert not has_ended(told)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays dead and unburied
        assert has_ended(told)
    assert has_ended(told)


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        ({"start": "1"}, True),  # its PID is another's now
        ({"pid": 2**22 + 1}, True),
        ({"boot": "another"}, True),
        ({"host": "another", "start": "1"}, False),
        ({"machine": "another", "start": "1"}, False),
        ({"namespace": "pid:[1]", "start": "1"}, False),
        ({"pid": "x"}, False),
    ],
)
def test_only_what_surely_ended_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, object], ended: bool
) -> None:
    monkeypatch.setattr(process, "MACHINE_ID", tmp_path / "machine-id")
    process.MACHINE_ID.write_text("0123456789abcdef\n")
    assert has_ended(json.dumps(json.loads(this_process()) | change)) is ended


def test_a_machine_without_a_network_card_knows_its_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python makes an address up then, another one in each process."""
    addresses = iter(range(2**40, 2**40 + 100))
    monkeypatch.setattr(uuid, "getnode", lambda: next(addresses))
    assert has_ended(json.dumps(json.loads(this_process()) | {"start": "1"}))


def test_another_boot_of_a_machine_without_an_id_may_be_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "MACHINE_ID", tmp_path / "none")
    told = json.loads(this_process())
    assert not has_ended(json.dumps(told | {"boot": "another"}))
    assert has_ended(json.dumps(told | {"start": "1"}))


@pytest.mark.parametrize("told", ["", "{}", "[]", "null", "1", '{"host": 1'])
def test_what_is_no_process_may_live(told: str) -> None:
    assert not has_ended(told)

"""Whether a process has ended, told from outside."""

import json
import os
import subprocess
import sys

import pytest

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
        ({"namespace": "pid:[1]", "start": "1"}, False),
        ({"pid": "x"}, False),
    ],
)
def test_only_what_surely_ended_has(change: dict[str, object], ended: bool) -> None:
    assert has_ended(json.dumps(json.loads(this_process()) | change)) is ended


@pytest.mark.parametrize("told", ["", "{}", "[]", "null", "1", '{"host": 1'])
def test_what_is_no_process_may_live(told: str) -> None:
    assert not has_ended(told)

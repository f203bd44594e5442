"""A log that outgrows its limit keeps its beginning and its end, and no half of a secret."""

import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import log_limit, logs
from registry.log_limit import LEFT_OUT, LogLimit

TOKEN = b"hf_kanaryABCDEFGHIJKLMNOPQRSTUVWXYZ01"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_limit, "LIMIT", 4000)
    monkeypatch.setattr(log_limit, "KEPT", 1000)


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., bytes]:
    """What is left of a log to which these pieces were written, one after the other."""

    def kept(*pieces: bytes) -> bytes:
        with logs.opened(tmp_path / "a.log") as output, LogLimit(output) as limit:
            for piece in pieces:
                output.write(piece)
                output.flush()
                limit.look()
        return (tmp_path / "a.log").read_bytes()

    return kept


def test_a_log_within_its_limit_stays_as_it_is(kept: Callable[..., bytes]) -> None:
    assert kept(b"a line\n" * 200, b"x" * 2600) == b"a line\n" * 200 + b"x" * 2600


def test_of_a_long_log_beginning_and_end_are_kept(kept: Callable[..., bytes]) -> None:
    lines = [b"line %d\n" % number for number in range(3000)]
    log = kept(b"".join(lines[:700]), *lines[700:])
    head, told, tail = log.partition(LEFT_OUT)
    assert told
    assert b"".join(lines).startswith(head)
    assert b"".join(lines).endswith(tail)
    assert 900 < len(head) <= 1000
    assert len(tail) > 900
    assert len(log) <= 4000
    assert LEFT_OUT not in tail


@pytest.mark.parametrize("before", [*range(1000 - len(TOKEN) - 2, 1002)])
def test_no_half_of_a_secret_is_left_where_the_middle_was(kept: Callable[..., bytes], before: int) -> None:
    log = kept(b"." * before + b" " + TOKEN + b"\n" + b"." * 3000 + TOKEN + b"\n" + b"." * (before - len(TOKEN)))
    assert LEFT_OUT in log
    assert b"kanary" not in log
    assert b"STUVWXYZ01" not in log


def test_a_private_key_that_began_in_the_middle_is_left_out(kept: Callable[..., bytes]) -> None:
    key = b"-----BEGIN PRIVATE KEY-----\n" + b"a2FuYXJ5a2FuYXJ5\n" * 80 + b"-----END PRIVATE KEY-----\n"
    log = kept(b"before\n" * 500 + key + b"after\n" * 20)
    assert b"a2FuYXJ5" not in log
    assert log.endswith(b"after\n" * 20)


def test_who_waits_is_woken_by_what_is_printed_and_by_nothing_else(tmp_path: Path) -> None:
    with logs.opened(tmp_path / "a.log") as output, LogLimit(output) as limit:
        poller = select.poll()
        poller.register(limit.written, select.POLLIN)
        assert poller.poll(100) == []
        subprocess.run(["echo", "a line"], stdout=output, check=True)
        assert poller.poll(10_000)
        limit.look()
        assert poller.poll(100) == []


def test_what_is_printed_while_a_log_is_shortened_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def printing(*arguments: int | bytes) -> int:
        monkeypatch.setattr(os, "pwrite", write)
        output.write(b"last words\n")
        output.flush()
        return write(*arguments)

    with logs.opened(tmp_path / "a.log") as output, LogLimit(output) as limit:
        output.write(b"a line\n" * 2000)
        output.flush()
        monkeypatch.setattr(os, "pwrite", printing)
        limit.look()
    assert (tmp_path / "a.log").read_bytes().endswith(b"a line\nlast words\n")


def test_a_machine_without_watches_has_its_log_shortened_once_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logs.opened(tmp_path / "a.log") as output:
        limit = LogLimit(output)
        os.close(limit.written)
        monkeypatch.setattr(limit, "written", -1)
        with limit:
            output.write(b"a line\n" * 2000)
            output.flush()
    assert LEFT_OUT in (tmp_path / "a.log").read_bytes()

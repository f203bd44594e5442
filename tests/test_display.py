"""The tables at the end of a call, and the lines below them."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from planning import Plan
from rich.console import Console
from rich.measure import Measurement
from test_record import made_up_record

from registry.display import PIPE_WIDTH, Reporter, console, notes, results, tell_status
from registry.outcome import Outcome
from registry.record import Record
from registry.redact import Redactor
from registry.status import Status
from registry.streams import Hiding, complain, visible


def shown(records: Sequence[Record]) -> list[tuple[list[str], list[str]]]:
    """Each table's headings and its rows' numbers, once it is seen to fit where there is no window."""
    told = []
    for table in results(records, PIPE_WIDTH):
        assert Measurement.get(Console(width=1000), Console(width=1000).options, table).maximum <= PIPE_WIDTH
        headings = [str(column.header) for column in table.columns]
        told.append((headings, [str(cell) for cell in table.columns[0].cells]))
    return told


def kernel(plan: Plan, index: int, name: str, us: float, session: int = 0) -> Record:
    """An attention kernel alone."""
    cell = plan("model=llama-3.1-8b", "protocol=attention", f"attention={name}", "execution.cache=dynamic")
    record = made_up_record(cell, index=index, record_id=f"k{index}", kind="attention", session=session)
    record.step_times_ms, record.call_times_us = [], [us, us * 1.1]
    record.metrics = {"median_call_us": us, "event_median_call_us": us, "layers_total_ms": us / 32, "call_gbs": 233.0}
    return record


def step(plan: Plan, index: int, execution: str, session: int = 0) -> Record:
    cell = plan("model=llama-3.1-8b", "protocol=paper", f"execution={execution}")
    return made_up_record(cell, index=index, record_id=f"s{index}", session=session)


def test_steps_and_kernels_alone_have_a_table_each(plan: Plan) -> None:
    """Together they would have every column of both and more than a pipe is wide; rows keep their numbers."""
    records = [
        step(plan, 0, "eager"),
        step(plan, 1, "eager", session=1),
        *(kernel(plan, 2 + place, name, 40.0) for place, name in enumerate(("sdpa", "sdpa-math"))),
    ]
    steps, kernels = shown(records)
    spreads = ["within", "across"]
    figures = ["TPOT ms", "tok/s", "floor ms", "r_floor", "mbu", "mbu att.", "peak GB", *spreads]
    assert steps == (["#", "outcome", *figures], ["1"])
    calls = ["us/call", "event us/call", "all layers ms", "GB/s"]
    assert kernels == (["#", "attention", "outcome", *calls], ["2", "3"])


def test_warnings_that_differ_in_their_numbers_are_one_line(plan: Plan) -> None:
    records = [kernel(plan, place, name, 40.0) for place, name in enumerate(("sdpa", "sdpa-math", "sdpa-flash"))]
    for record, clock in zip(records, (1665, 1650, 1980), strict=True):
        record.warnings = [f"throttled: SM clock {clock} of 1980 MHz"]
    records[0].warnings.append("unsteady")
    assert notes(records) == [
        "#1-3 warning: throttled: SM clock 1650 to 1980 of 1980 MHz",
        "#1 warning: unsteady",
    ]


def test_a_sweep_whose_name_looks_like_markup_is_told_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """As a damaged record may have it."""
    tell_status([Status("[/]", "[red]2026", 1, 1)], in_full=True)
    assert "[/]" in capsys.readouterr().out


# What a terminal would obey

OBEYED = {
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "colour": ("\x1b[31m[red]", r"\x1b[31m[red]"),
    "control": ("a\rb\x9b2J", r"a\rb\x9b2J"),
    "right to left": ("a\u202eb\u2066", r"a\u202eb\u2066"),
}


@pytest.mark.parametrize("kind", OBEYED)
def test_what_a_terminal_would_obey_is_told_as_an_escape(
    plan: Plan, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A record may come from anybody; so may the name of a file."""
    text, escaped = OBEYED[kind]
    record = step(plan, 0, "eager")
    record.label = record.reason = text
    record.outcome = Outcome.CRASH
    record.config["model"]["name"] = text
    tell_status([Status(text, "2026", 1, 0, [(record, Path(text))])], in_full=True)
    for table in results([record, step(plan, 1, "eager")], PIPE_WIDTH):
        console().print(table)
    for line in notes([record]):
        console().print(line, markup=False, highlight=False)
    with Reporter(1) as reporter:
        reporter.begin(text)
        reporter.stage(f"build {text}")
        reporter.done(record)
    complain(text)
    out, err = capsys.readouterr()
    assert text not in out + err
    assert escaped in out
    assert err.count(escaped) == 5
    assert visible(out + err) == out + err


def test_what_others_print_says_nothing_to_a_terminal_but_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Hiding(stream, Redactor()))
    print("\x1b[1;31mred\x1b[0m \x1b]0;owned\x07 \x1bc \u202eb\r\tc\xa0d é")
    assert stream.getvalue() == "\x1b[1;31mred\x1b[0m \\x1b]0;owned\\x07 \\x1bc \\u202eb\r\tc\xa0d é\n"

"""What a person sees: progress while cells run, and the tables at the end."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from registry import floor, stats
from registry.alike import as_one, words
from registry.outcome import Outcome
from registry.repeats import by_cell
from registry.schema import GROUPS
from registry.streams import visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.text import Text

    from registry.manifest import Planned
    from registry.plan import Cell
    from registry.record import Head, Record
    from registry.status import Status

AXES = tuple(group for group in GROUPS if group not in ("protocol", "experiment", "tracking"))
PLAIN = ("auto", "hf", "none", "sdpa", "eager")
"""The choices that a sweep starts from."""
PIPE_WIDTH = 160  # where nobody has a window, nothing is folded
NARROW = 100
STYLES = {Outcome.OK: "green", Outcome.OOM: "yellow", Outcome.UNSUPPORTED: "yellow"}
FIGURES = (
    ("TPOT ms", "median_tpot_ms", "{:.2f}", 0),
    ("tok/s", "tokens_per_s", "{:.1f}", NARROW),
    ("floor ms", "floor_ms", "{:.2f}", 0),
    ("r_floor", "r_floor", "{:.3f}", 0),
    ("mbu", "mbu", "{:.3f}", 0),
    ("mbu att.", "mbu_attainable", "{:.3f}", NARROW),
    ("peak GB", "peak_memory_gb", "{:.2f}", NARROW),
)
"""Heading, metric, format, and the least width of window that has room for it."""
KERNEL_FIGURES = (
    ("us/call", "median_call_us", "{:.2f}", 0),
    ("event us/call", "event_median_call_us", "{:.2f}", NARROW),
    ("all layers ms", "layers_total_ms", "{:.2f}", 0),
    ("GB/s", "call_gbs", "{:.0f}", 0),
)
"""The same of an attention kernel alone."""
Figure = tuple[str, str, str, int]
FIGURES_OF: dict[str, tuple[Figure, ...]] = {"step": FIGURES, "attention": KERNEL_FIGURES}
"""By the kind of record."""
SPREADS = (("within",), ("across",))
"""Headings of the spreads of a cell that was measured in several sessions."""


class _Visible(Console):
    """A console to which a text, of a table's cell too, says nothing that does not print."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def console(stderr: bool = False) -> Console:
    """A console as wide as its window, or wide enough when its output goes to a file."""
    made = _Visible(stderr=stderr)
    return made if made.is_terminal else _Visible(stderr=stderr, width=PIPE_WIDTH)


LONG = ("build ", "synthesize ", "wait: ")
"""How stages begin that may take minutes."""


class Reporter:
    """A progress bar on a terminal, a line a cell elsewhere.

    The bar is redrawn when something is told, never on a timer: a timed window is quiet in the parent too.

    Args:
        total: Cells in the sweep.
    """

    def __init__(self, total: int) -> None:
        self.console = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[stage]}", style="dim", markup=False),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("cells", total=total, stage="")
        self._label = ""
        self._told: set[str] = set()

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, label: str) -> None:
        """A cell begins."""
        self._label = visible(label)
        self.stage("plan")

    def stage(self, name: str) -> None:
        """A worker says what it begins; where there is no bar, what takes minutes gets a line, once."""
        name = visible(name)
        if not self.console.is_terminal and name.startswith(LONG) and name not in self._told:
            self._told.add(name)
            self.console.print(f"{self._label}: {name}", markup=False, highlight=False)
        self._progress.update(self._task, stage=f"{self._label}: {name}")
        self._progress.refresh()

    def done(self, record: Record) -> None:
        """A cell ended."""
        figures = record.metrics
        if record.outcome is not Outcome.OK:
            told = record.reason
        elif record.kind == "step":
            told = f"{figures['median_tpot_ms']:.2f} ms  r_floor {figures['r_floor']:.3f}"
        else:
            told = f"{figures['median_call_us']:.2f} us a call"
        style = STYLES.get(record.outcome, "red")
        line = f"[{style}]{record.outcome.value}[/] {escape(f'{record.label}  {told}')}"
        self.console.print(line, highlight=False)
        self._progress.advance(self._task)
        self._progress.refresh()


def results(records: Sequence[Record], width: int) -> list[Table]:
    """A table for each kind of record, one row a cell: the axes that differ, the outcome, the figures that fit.

    A cell that was measured in several sessions has the medians of their figures, and the spread of its step times
    within a session beside that of the sessions' medians.
    """
    kinds: dict[str, list[tuple[int, list[Record]]]] = {}
    for row, sessions in enumerate(_by_cell(records), start=1):
        kinds.setdefault(sessions[0].kind, []).append((row, sessions))
    return [_of_kind(rows, FIGURES_OF[kind], width) for kind, rows in kinds.items()]


def _of_kind(rows: Sequence[tuple[int, Sequence[Record]]], figures: Sequence[Figure], width: int) -> Table:
    """The table of some cells, each with the number of its row among all."""
    told = [axes_of(sessions[0].config) for _, sessions in rows]
    table, axes = _table(told)
    known = {metric for _, sessions in rows for record in sessions for metric in record.metrics}
    figures = [figure for figure in figures if width >= figure[3] and (figure[1] in known or not known)]
    table.add_column("outcome", no_wrap=True)
    repeated = any(len(sessions) > 1 for _, sessions in rows)
    for heading, *_ in [*figures, *(SPREADS if repeated else ())]:
        table.add_column(heading, justify="right", no_wrap=True)
    for (row, sessions), cell in zip(rows, told, strict=True):
        table.add_row(
            str(row),
            *(escape(cell[axis]) for axis in axes),
            _outcomes(sessions),
            *(_median(sessions, name, form) for _, name, form, _ in figures),
            *(_spreads(sessions) if repeated else ()),
        )
    return table


def _by_cell(records: Sequence[Record]) -> list[list[Record]]:
    """The sessions of each cell."""
    found = [*by_cell(records, lambda record: record).values()]
    return sorted(found, key=lambda sessions: place_of(sessions[0].config)) if len(found) < len(records) else found


def _outcomes(sessions: Sequence[Record]) -> str:
    counts = Counter(record.outcome for record in sessions)
    if len(counts) == 1:
        outcome = sessions[0].outcome
        return f"[{STYLES.get(outcome, 'red')}]{outcome.value}[/]"
    return ", ".join(f"[{STYLES.get(outcome, 'red')}]{outcome.value}[/] x{n}" for outcome, n in counts.items())


def _median(sessions: Sequence[Record], metric: str, form: str) -> str:
    values = [record.metrics[metric] for record in sessions if metric in record.metrics]
    return form.format(median(values)) if values else ""


def _spreads(sessions: Sequence[Record]) -> list[str]:
    times = [record.step_times_ms or record.call_times_us for record in sessions if record.outcome is Outcome.OK]
    if not times:
        return ["", ""]
    found = stats.spread(times)
    return [f"{found.within:.1%}", "" if found.across is None else f"{found.across:.1%}"]


def notes(records: Sequence[Record]) -> list[str]:
    """Why cells were not measured and what weakens those that were, each once with its rows' numbers.

    Warnings that differ in their numbers alone are one, with the least and the greatest of each.
    """
    found: dict[object, tuple[list[str], dict[int, None]]] = {}

    def tell(key: object, text: str, row: int) -> None:
        texts, rows = found.setdefault(key, ([], {}))
        texts.append(text)
        rows[row] = None

    for row, sessions in enumerate(_by_cell(records), start=1):
        for record in sessions:
            if record.reason:
                remedy = f". {record.remedy}" if record.remedy else ""
                text = f"{record.outcome.value}: {record.reason}{remedy}"
                tell(text, text, row)
            for warning in record.warnings:
                tell(words(warning), f"warning: {warning}", row)
    return [
        f"{_numbers([*rows])} {texts[0] if isinstance(key, str) else as_one(texts)}"
        for key, (texts, rows) in found.items()
    ]


def tell_status(found: Sequence[Status], in_full: bool) -> None:
    """Print a row a sweep; in full also a line for each cell that is not measured."""
    out = console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("sweep", "begun", "cells", "done", "failed", "missing", "state"):
        table.add_column(
            heading, justify="left" if heading in ("sweep", "begun", "state") else "right", overflow="fold"
        )
    for one in found:
        told = str(one.planned) if one.planned is not None else "?"
        counts = (told, str(one.done), str(len(one.failed)), str(len(one.missing)))
        table.add_row(escape(one.sweep_id), escape(one.started_at[:19].replace("T", " ")), *counts, one.state)
    out.print(table)
    lines = []
    for one in found if in_full else ():
        lines += [f"{head.outcome} {_place(head)}: {file}" for head, file in one.failed]
        lines += [f"missing {_place(job)}" for job in one.missing]
    if any(one.state == "cut short" or one.failed for one in found):
        lines.append("The call of a sweep, given again with resume=true, measures what failed or is missing.")
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _place(job: Head | Planned) -> str:
    """Which of a sweep's cells something is, in the numbers that its record's file and content have."""
    return f"place {job.index} session {job.session} {job.label}"


def plan_table(cells: Sequence[Cell]) -> Table:
    """The dry run's table: what each cell would need and how it would end if not ok."""
    told = [axes_of(vars(cell.config)) for cell in cells]
    table, axes = _table(told)
    for heading in ("floor ms", "needs GB", "of GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("would be", no_wrap=True)
    for number, (cell, row) in enumerate(zip(cells, told, strict=True), start=1):
        gpu = cell.config.gpu
        memory = gpu.memory_gb or (cell.device.memory_bytes / floor.GB if gpu.measure_bandwidth else None)
        table.add_row(
            str(number),
            *(escape(row[axis]) for axis in axes),
            f"{floor.floor_ms(cell.study_bytes, gpu.peak_bandwidth_gbs):.3f}"
            if gpu.peak_bandwidth_gbs
            else "by probe",
            f"{cell.memory_need / floor.GB:.2f}",
            f"{memory:.0f}" if memory else "",
            f"[yellow]{cell.refusal.outcome.value}[/]" if cell.refusal else "run",
        )
    return table


def plan_notes(cells: Sequence[Cell]) -> list[str]:
    """Why cells would be refused, each reason once with its rows' numbers."""
    rows: dict[str, list[int]] = {}
    for row, cell in enumerate(cells, start=1):
        if cell.refusal:
            rows.setdefault(f"{cell.refusal.outcome.value}: {cell.refusal}", []).append(row)
    told = [f"{_numbers(found)} {text}" for text, found in rows.items()]
    sessions = cells[0].config.protocol.sessions
    return [*told, *([f"Each cell is measured in {sessions} sessions"] if sessions > 1 else [])]


def _numbers(rows: Sequence[int]) -> str:
    """Row numbers as a reader would write them: #1, #3-5."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return "#" + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _table(cells: Sequence[Mapping[str, str]]) -> tuple[Table, list[str]]:
    """A table with a column for each axis that varies, the others told in its title."""
    axes = [axis for axis in (cells[0] if cells else ()) if len({cell[axis] for cell in cells}) > 1]
    if "execution" in axes and len({(cell["execution"], cell["cache"]) for cell in cells}) == len(
        {cell["execution"] for cell in cells}
    ):
        axes = [axis for axis in axes if axis != "cache"]  # the execution's own, not a choice of this sweep
    constant = "  ".join(f"{axis}={value}" for axis, value in cells[0].items() if axis not in (*axes, "cache"))
    table = Table(
        title=escape(constant), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("#", justify="right", no_wrap=True)
    for axis in axes:
        table.add_column(axis, no_wrap=True)
    return table, axes


def place_of(config: Mapping[str, object]) -> list[tuple[bool, float, str]]:
    """What cells are sorted by that were measured in random order: plain choices first, numbers by size."""
    told = axes_of(config).values()
    return [(value not in PLAIN, float(value) if value.isdecimal() else 0.0, value) for value in told]


def axes_of(config: Mapping[str, object]) -> dict[str, str]:
    """What distinguishes cells: the name chosen in each group, and the protocol's numbers."""

    def get(part: object, key: str) -> object:
        return part[key] if isinstance(part, dict) else getattr(part, key)

    found = {axis: str(get(config[axis], "name")) for axis in AXES}
    found |= {key: str(get(config["protocol"], key)) for key in ("context", "batch_size", "seed")}
    found["cache"] = str(get(config["execution"], "cache"))
    return found

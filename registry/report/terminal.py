"""The end of an experiment on a terminal: its main tables, its verdicts, where the rest lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from registry.display import console

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from registry.report import document


def tell_report(report: document.Report, files: Sequence[Path]) -> None:
    """Print a report's main tables, as many of their columns as the window has room for, and its verdicts."""
    out = console()
    left_out: dict[str, None] = {}
    out.print(report.question, style="bold", highlight=False, markup=False)
    for section in report.sections:
        for table in [table for table in section.tables if section.on_terminal and table.rows]:
            shown, spared = _fitting(table, section.title, out)
            out.print(shown)
            left_out |= dict.fromkeys(spared)
    for verdict in report.verdict_lines:
        out.print(verdict, highlight=False, markup=False)
    if left_out:
        out.print(f"Left out for want of room: {', '.join(left_out)}", highlight=False, markup=False, soft_wrap=True)
    told = " and ".join(str(file) for file in files)
    out.print(f"The report of {report.title}: {told}", highlight=False, markup=False, soft_wrap=True)


def _fitting(table: document.Table, title: str, out: Console) -> tuple[Table, list[str]]:
    """A table as the window has room for it, and the columns that it goes without."""
    spared: list[str] = []
    for heading in (*(name for name in table.spare if name in table.headings), ""):
        shown = _drawn(table, title, spared)
        needed = Measurement.get(out, out.options.update(max_width=10_000), shown).maximum
        if needed <= out.width or not heading:
            break
        spared.append(heading)
    return shown, spared


def _drawn(table: document.Table, title: str, spared: Sequence[str]) -> Table:
    kept = [place for place, heading in enumerate(table.headings) if heading not in spared]
    shown = Table(
        title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for place in kept:
        side = "left" if place < table.text_columns else "right"
        shown.add_column(table.headings[place], justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in table.rows:
        shown.add_row(*(escape(row.cells[place]) for place in kept))
    return shown

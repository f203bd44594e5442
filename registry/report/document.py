"""A report's parts, and the report as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from registry.report.observation import Observation

RUNS = "runs"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        cells: Ready to be read.
        runs: Where its figures come from.
    """

    cells: Sequence[str]
    runs: Sequence[Observation] = ()


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        headings: One a column.
        rows: As many cells each as there are headings.
        text_columns: How many columns at the left are text; the others are numbers.
        spare: Headings of the columns that a narrow window goes without, the most dispensable first.
    """

    headings: Sequence[str]
    rows: Sequence[Row]
    text_columns: int = 1
    spare: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """One thing that a report tells.

    Attributes:
        title: What it is.
        text: Paragraphs, plain.
        tables: Its figures.
        figures: Makes Plotly figures when a page is drawn.
        on_terminal: Whether its tables are shown at the end of a sweep too.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Callable[[], list[Any]] | None = None
    on_terminal: bool = False


@dataclass
class Report:
    """What recorded runs say of an experiment.

    Attributes:
        title: The experiment.
        question: What it asks.
        facts: On what it was measured.
        sections: What is told, in order.
        verdicts: What is said of the claims of each registration, by its record.
    """

    title: str
    question: str
    facts: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    verdicts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def verdict_lines(self) -> list[str]:
        """The verdicts, one after the other."""
        return [line for lines in self.verdicts.values() for line in lines]

    def numbered(self) -> dict[str, tuple[int, Observation]]:
        """Every run that a figure comes from, numbered in the order in which the tables name them."""
        found: dict[str, tuple[int, Observation]] = {}
        for section in self.sections:
            for table in section.tables:
                for row in table.rows:
                    for one in row.runs:
                        found.setdefault(one.trace, (len(found) + 1, one))
        return found


def references(row: Row, numbered: dict[str, tuple[int, Observation]]) -> list[tuple[int, ...]]:
    """The numbers of a row's runs, in ascending order: the first and the last of those that follow one another."""
    spans: list[tuple[int, ...]] = []
    for number in sorted({numbered[one.trace][0] for one in row.runs}):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number,))
    return spans


def markdown(report: Report) -> str:
    """The report's words and tables as GitHub's Markdown."""
    numbered = report.numbered()
    lines = [f"# {report.title}", "", report.question, ""]
    lines += [*(f"- {fact}" for fact in report.facts), ""]
    for verdict in report.verdict_lines:
        lines += [f"**{verdict}**", ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        for table in section.tables:
            lines += [*_table(table, numbered), ""]
    lines += ["## Runs", "", "| # | run | record | outcome | cell |", "|---:|---|---|---|---|"]
    for number, one in numbered.values():
        r = one.record
        lines.append(_line([str(number), one.run_id or "-", r.record_id, r.outcome.value, r.label]))
    return "\n".join(lines) + "\n"


def _table(table: Table, numbered: dict[str, tuple[int, Observation]]) -> list[str]:
    sides = ["---"] * table.text_columns + ["---:"] * (len(table.headings) - table.text_columns)
    traced = any(row.runs for row in table.rows)
    headings = [*table.headings, *([RUNS] if traced else [])]
    lines = [_line(headings), "|" + "|".join([*sides, *(["---"] if traced else [])]) + "|"]
    for row in table.rows:
        spans = ["-".join(map(str, span)) for span in references(row, numbered)]
        lines.append(_line([*row.cells, *([", ".join(spans)] if traced else [])]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

"""A report as one HTML page that needs nothing else: no network, no file beside it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from registry.report.document import RUNS, references

if TYPE_CHECKING:
    from registry.report.document import Report, Section, Table
    from registry.report.observation import Observation

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1480px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.verdict { background: #f2f5f9; border-left: 4px solid #3465a4; padding: .6rem 1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
th, td { padding: .25rem .35rem; border-bottom: 1px solid #e5e5e5; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #999; } .text { text-align: left; }
.short, .span { white-space: nowrap; } .long { overflow-wrap: anywhere; min-width: 22rem; }
td { font-variant-numeric: tabular-nums; }
a { color: #3465a4; text-decoration: none; } code { font-size: .85em; }
"""


SHORT = 44
"""Characters of a first column that is not broken into lines."""


def html(report: Report) -> str:
    """The whole page, Plotly's script in it."""
    numbered = report.numbered()
    body = [f"<h1>{escape(report.title)}</h1>", f"<p>{escape(report.question)}</p>"]
    body += ["<ul>", *(f"<li>{escape(fact)}</li>" for fact in report.facts), "</ul>"]
    body += [f'<p class="verdict">{escape(verdict)}</p>' for verdict in report.verdict_lines]
    drawn = False
    for section in report.sections:
        body += _section(section, numbered)
        for figure in section.figures() if section.figures else []:
            body.append(figure.to_html(full_html=False, include_plotlyjs=not drawn, config={"displayModeBar": False}))
            drawn = True
    body += _runs(numbered)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _section(section: Section, numbered: dict[str, tuple[int, Observation]]) -> list[str]:
    lines = [f"<h2>{escape(section.title)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.text)]
    return lines + [_table(table, numbered) for table in section.tables]


def _table(table: Table, numbered: dict[str, tuple[int, Observation]]) -> str:
    traced = any(row.runs for row in table.rows)
    kinds = ["text"] * table.text_columns + [""] * (len(table.headings) - table.text_columns)
    longest = max((len(row.cells[0]) for row in table.rows), default=0)
    kinds[0] += " short" if longest <= SHORT else " long"
    head = "".join(
        f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(table.headings, kinds, strict=True)
    )
    lines = [f'<div class="wide"><table><tr>{head}{"<th>" + RUNS + "</th>" if traced else ""}</tr>']
    for row in table.rows:
        cells = "".join(
            f'<td class="{kind}">{escape(cell)}</td>' for cell, kind in zip(row.cells, kinds, strict=True)
        )
        links = ", ".join(_link(span) for span in references(row, numbered))
        lines.append(f"<tr>{cells}{f'<td>{links}</td>' if traced else ''}</tr>")
    return "\n".join([*lines, "</table></div>"])


def _link(ends: tuple[int, ...]) -> str:
    return '<span class="span">' + "-".join(f'<a href="#run-{end}">{end}</a>' for end in ends) + "</span>"


def _runs(numbered: dict[str, tuple[int, Observation]]) -> list[str]:
    lines = ['<h2>Runs</h2><div class="wide"><table><tr><th>#</th>']
    lines += [f'<th class="text">{name}</th>' for name in ("MLflow run", "record", "outcome", "cell", "began")]
    lines.append("</tr>")
    for number, one in numbered.values():
        r = one.record
        codes = [f"<code>{escape(code)}</code>" for code in (one.run_id or "-", r.record_id)]
        texts = [*codes, r.outcome.value, escape(r.label), escape(r.started_at[:16]).replace("T", "&nbsp;")]
        cells = "".join(f'<td class="text">{text}</td>' for text in texts)
        lines.append(f'<tr id="run-{number}"><td>{number}</td>{cells}</tr>')
    return [*lines, "</table></div>"]

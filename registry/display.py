"""What a person sees: progress while cells run, and the tables at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from registry import floor
from registry.outcome import Outcome
from registry.schema import GROUPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from registry.plan import Cell
    from registry.record import Record

AXES = tuple(group for group in GROUPS if group not in ("protocol", "tracking"))
STYLES = {Outcome.OK: "green", Outcome.OOM: "yellow", Outcome.UNSUPPORTED: "yellow"}
FIGURES = (
    ("TPOT ms", "median_tpot_ms", "{:.2f}"),
    ("tok/s", "tokens_per_s", "{:.1f}"),
    ("floor ms", "floor_ms", "{:.2f}"),
    ("r_floor", "r_floor", "{:.3f}"),
    ("mbu", "mbu", "{:.3f}"),
    ("mbu att.", "mbu_attainable", "{:.3f}"),
    ("peak GB", "peak_memory_gb", "{:.2f}"),
)


class Reporter:
    """A progress bar on a terminal, a line a cell elsewhere.

    The bar is redrawn when something is told, never on a timer: a timed window is quiet in the parent too.

    Args:
        total: Cells in the sweep.
    """

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[stage]}"),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("cells", total=total, stage="")
        self._label = ""

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, label: str) -> None:
        """A cell begins."""
        self._label = label
        self.stage("plan")

    def stage(self, name: str) -> None:
        """A worker says what it begins."""
        self._progress.update(self._task, stage=f"{self._label}: {name}")
        self._progress.refresh()

    def done(self, record: Record) -> None:
        """A cell ended."""
        figures = record.metrics
        told = (
            f"{figures['median_tpot_ms']:.2f} ms  r_floor {figures['r_floor']:.3f}" if figures else record.reason
        )
        style = STYLES.get(record.outcome, "red")
        self.console.print(f"[{style}]{record.outcome.value}[/] {record.label}  {told}", highlight=False)
        self._progress.advance(self._task)
        self._progress.refresh()


def results(records: Sequence[Record]) -> Table:
    """One row a cell: the axes that differ, the outcome, the figures."""
    cells = [_axes(record.config) for record in records]
    axes = _varying(cells)
    table = Table(title=_constant(cells, axes), title_justify="left", title_style="bold", pad_edge=False)
    for axis in axes:
        table.add_column(axis, overflow="fold")
    table.add_column("outcome")
    for heading, _, _ in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    for record, cell in zip(records, cells, strict=True):
        style = STYLES.get(record.outcome, "red")
        table.add_row(
            *(cell[axis] for axis in axes),
            f"[{style}]{record.outcome.value}[/]",
            *(form.format(record.metrics[name]) if name in record.metrics else "" for _, name, form in FIGURES),
        )
    return table


def notes(records: Sequence[Record]) -> list[str]:
    """Why cells were not measured and what weakens those that were, each once."""
    lines: dict[str, None] = {}
    for record in records:
        if record.reason:
            lines[f"{record.outcome.value}: {record.reason}" + (f". {record.remedy}" if record.remedy else "")] = None
        for warning in record.warnings:
            lines[f"warning: {warning}"] = None
    return list(lines)


def plan_table(cells: Sequence[Cell]) -> Table:
    """The dry run's table: what each cell would need and what would refuse it."""
    told = [_axes(vars(cell.config)) for cell in cells]
    axes = _varying(told)
    table = Table(title=_constant(told, axes), title_justify="left", title_style="bold", pad_edge=False)
    for axis in axes:
        table.add_column(axis, overflow="fold")
    for heading in ("floor ms", "needs GB", "of GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("would be refused", overflow="fold")
    for cell, row in zip(cells, told, strict=True):
        gpu = cell.config.gpu
        refusal = f"{cell.refusal.outcome.value}: {cell.refusal}" if cell.refusal else ""
        memory = gpu.memory_gb or (cell.device.memory_bytes / floor.GB if gpu.measure_bandwidth else None)
        table.add_row(
            *(row[axis] for axis in axes),
            f"{floor.floor_ms(cell.study_bytes, gpu.peak_bandwidth_gbs):.3f}"
            if gpu.peak_bandwidth_gbs
            else f"{cell.study_bytes / floor.GB:.2f} GB / measured",
            f"{cell.memory_need / floor.GB:.2f}",
            f"{memory:.0f}" if memory else "",
            refusal,
        )
    return table


def _axes(config: Mapping[str, object]) -> dict[str, str]:
    """What distinguishes cells: the name chosen in each group, and the protocol's numbers."""

    def get(part: object, key: str) -> object:
        return part[key] if isinstance(part, dict) else getattr(part, key)

    found = {axis: str(get(config[axis], "name")) for axis in AXES}
    found |= {key: str(get(config["protocol"], key)) for key in ("context", "batch_size", "seed")}
    found["cache"] = str(get(config["execution"], "cache"))
    return found


def _varying(cells: Sequence[Mapping[str, str]]) -> list[str]:
    axes = list(cells[0]) if cells else []
    return [axis for axis in axes if len({cell[axis] for cell in cells}) > 1]


def _constant(cells: Sequence[Mapping[str, str]], axes: Iterable[str]) -> str:
    return "  ".join(f"{axis}={cells[0][axis]}" for axis in cells[0] if axis not in set(axes)) if cells else ""

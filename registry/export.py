"""Records as the study's own cell files: its keys, and a file a cell under the names that it uses."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome
from registry.record import write_json
from registry.schema import COMPILE_MODES, what_decides

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from registry.record import Record
    from registry.schema import ExperimentConfig


NO_NAME = re.compile(r"[^A-Za-z0-9_-]")
"""What no file of the study's has in its name; a record may come from anywhere."""
LONGEST = 140
"""Characters of such a name."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: In order.
        left_out: How many records have no file.
        renamed: How many files bear their sweep and cell behind the study's name, which several cells would have had.
    """

    files: list[Path]
    left_out: int
    renamed: int


def export(records: Sequence[Record], experiments: Mapping[str, ExperimentConfig], folder: Path) -> Exported:
    """Write the study's files.

    Args:
        records: Of any sweeps; only measured steps count.
        experiments: By name; records of others, and of those that are nothing to the study, have no file.
        folder: Where to.
    """
    own = [one for one in sorted(records, key=lambda one: one.started_at) if _is_cell(one, experiments)]
    files = [file for name in experiments for file in _files(own, experiments[name])]
    met = Counter(file.name for file in files)
    written: list[Path] = []
    counted: set[str] = set()
    for file in files:
        name = file.name if met[file.name] == 1 else f"{file.name}_{file.identity}"
        written.append(folder / f"{name}.json")
        write_json(written[-1], file.content)
        counted |= file.records
    renamed = sum(count for count in met.values() if count > 1)
    return Exported(written, len(records) - len(counted), renamed)


@dataclass(frozen=True)
class _File:
    """A file of the study: its name without an ending, what tells it from another of that name, and what it holds."""

    name: str
    identity: str
    content: dict[str, Any]
    records: frozenset[str]


def _is_cell(record: Record, experiments: Mapping[str, ExperimentConfig]) -> bool:
    return record.outcome is Outcome.OK and record.kind == "step" and record.experiment in experiments


def _files(records: Sequence[Record], experiment: ExperimentConfig) -> Iterator[_File]:
    own = [one for one in records if one.experiment == experiment.name]
    shape = experiment.study_files
    if shape == "pairs":
        yield from _pairs(own, experiment)
    elif shape is not None:
        for one in own:
            keys = frozenset({one.record_id})
            yield _File(_safe(_prefix(shape, one)), _identity(one), one.study | _keys(shape, one), keys)


def _pairs(records: Sequence[Record], experiment: ExperimentConfig) -> Iterator[_File]:
    """A file for each two arms that one session of one sweep measured, or for the one that it has."""
    group = experiment.arms or ""
    sessions: dict[tuple[str, int, str], dict[str, list[Record]]] = {}
    for one in records:
        config = what_decides(one.config)
        arm = config.pop(group, {}).get("name")
        rest = json.dumps([config, one.environment.get("device")], sort_keys=True)
        sessions.setdefault((one.sweep_id, one.session, rest), {}).setdefault(arm, []).append(one)
    for arms in sessions.values():
        for eager in _or_none(arms.get(str(experiment.baseline))):
            for graphed in _or_none(arms.get(str(experiment.candidate))):
                both = [one for one in (graphed, eager) if one]
                if not both:
                    continue
                content = {key: value for one in both for key, value in one.study.items()}
                content |= {"eager_p50_ms": eager.study["p50_ms"]} if eager else {}
                content |= {"graphed_p50_ms": graphed.study["p50_ms"]} if graphed else {}
                keys = frozenset(one.record_id for one in both)
                yield _File(_safe(_prefix("pairs", both[-1])), "_".join(map(_identity, both[::-1])), content, keys)


def _or_none(found: Sequence[Record] | None) -> Sequence[Record | None]:
    return found or [None]


def _safe(name: str) -> str:
    return NO_NAME.sub("_", name)[:LONGEST]


def _identity(record: Record) -> str:
    return _safe(f"{record.sweep_id}-{record.index}-{record.cell_id}")


def _prefix(shape: str, record: Record) -> str:
    c = record.config
    model, gpu = (_plain(c[group]["name"]) for group in ("model", "gpu"))
    context = f"ctx{c['protocol']['context']}"
    batch = f"_b{c['protocol']['batch_size']}" if c["protocol"]["batch_size"] > 1 else ""
    session = f"_s{record.session}"
    if shape == "pairs":
        return f"cudagraphs_{gpu}_{model}_{context}{batch}{session}"
    if shape == "stack":
        names = [_plain(c[group]["name"]) for group in ("backend", "attention", "execution")]
        return f"oft_{gpu}_{model}_{context}_{'_'.join(names)}{session}"
    if shape == "quant":
        names = [_plain(c[group]["name"]) for group in ("quant", "backend", "execution")]
        return f"quant_{gpu}_{model}_{context}_{'_'.join(names)}{session}"
    if shape == "profile":
        return f"profile_{gpu}_{model}_{context}_{_plain(c['execution']['name'])}{session}"
    return f"{model}_{gpu}_{context}" + (session if record.session else "")


def _keys(shape: str, record: Record) -> dict[str, Any]:
    """The keys that the study's cells of this kind carry beyond every cell's."""
    c = record.config
    launch = c["execution"].get("launch", c["execution"]["name"])  # older records say it by the name alone
    if shape == "stack":
        compiled = launch == "compile"
        graphs = _records_graphs(record) if compiled else launch == "cuda_graph"
        return {"attn": c["attention"]["name"], "compile": compiled, "graphs": graphs}
    if shape == "profile":
        return {key: record.metrics[key] for key in ("bw_util", "cpu_cuda_ratio") if key in record.metrics}
    return {}


def _records_graphs(record: Record) -> bool:
    """Whether a compiled step was replayed as CUDA graphs: its mode says so, and none was skipped."""
    skipped = record.measured.get("execution", {}).get("cudagraph_skips")
    return COMPILE_MODES.get(record.config["execution"].get("mode") or "", False) and not skipped


def _plain(name: str) -> str:
    """A name as the study writes it: qwen25_7b for qwen2.5-7b."""
    return name.replace(".", "").replace("-", "_")

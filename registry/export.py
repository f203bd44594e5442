"""Records as the study's own cell files: its keys, and a file a cell under the names that it uses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome
from registry.record import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from registry.record import Record


NO_NAME = re.compile(r"[^A-Za-z0-9_]")
"""What no file of the study's has in its name; a record may come from anywhere."""
LONGEST = 200
"""Characters of such a name."""


def export(records: Sequence[Record], shapes: Mapping[str, str | None], folder: Path) -> tuple[list[Path], int]:
    """Write the study's files.

    Args:
        records: Of any sweeps; only measured steps count.
        shapes: Of each experiment, one of `registry.validate.STUDY_FILES`; without one its records have no file.
        folder: Where to.

    Returns:
        The files, and how many records have none.
    """
    files: dict[str, dict[str, Any]] = {}
    left_out = 0
    for record in sorted(records, key=lambda one: one.started_at):
        shape = shapes.get(record.experiment)
        if record.outcome is not Outcome.OK or record.kind != "step" or shape is None:
            left_out += 1
            continue
        name = f"{NO_NAME.sub('_', _prefix(shape, record))[:LONGEST]}.json"
        keys, known = _keys(shape, record), files.get(name, {})
        files[name] = (record.study | known if "graphed_p50_ms" in keys else known | record.study) | keys
    for name, content in files.items():
        write_json(folder / name, content)
    return [folder / name for name in files], left_out


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
    if shape == "pairs":
        arm = "graphed_p50_ms" if launch == "cuda_graph" else "eager_p50_ms"
        return {arm: record.study["p50_ms"]}
    if shape == "stack":
        compiled, graphs = launch == "compile", launch == "cuda_graph"
        return {"attn": c["attention"]["name"], "compile": compiled, "graphs": graphs}
    if shape == "profile":
        return {key: record.metrics[key] for key in ("bw_util", "cpu_cuda_ratio") if key in record.metrics}
    return {}


def _plain(name: str) -> str:
    """A name as the study writes it: qwen25_7b for qwen2.5-7b."""
    return name.replace(".", "").replace("-", "_")

"""What a configuration's values may be: everything that can be refused by looking at one cell's numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from registry.outcome import BadInput, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry.schema import Config, GpuConfig, TrackingConfig

EXECUTIONS = ("eager", "cuda_graph")
CACHES = ("dynamic", "static")
MODEL_TYPES = ("qwen2", "llama", "mistral")
"""The Llama-shaped families whose tensors rfloor knows by name."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https")
SQLITE_MAGIC = b"SQLite format 3\x00"


def validate(config: Config) -> None:
    """Refuse a cell whose values are out of range.

    Raises:
        BadInput: Every problem found, in one message.
    """
    problems = [*_model(config), *_protocol(config), *_choices(config), *_tracking(config.tracking)]
    if problems:
        raise BadInput("; ".join(problems))


def validate_profile(gpu: GpuConfig) -> None:
    """Refuse a GPU profile that no floor can be computed from.

    Raises:
        BadInput: It has no bandwidth, or one that is not positive.
    """
    if gpu.measure_bandwidth:
        return
    if gpu.peak_bandwidth_gbs is None:
        raise BadInput(
            f"the GPU profile {gpu.name!r} has no bandwidth: give gpu.peak_bandwidth_gbs=... (GB/s, from its spec "
            "sheet) or gpu.measure_bandwidth=true"
        )
    if gpu.peak_bandwidth_gbs <= 0:
        raise BadInput(f"gpu.peak_bandwidth_gbs={gpu.peak_bandwidth_gbs}: a bandwidth is positive")


def _model(config: Config) -> Iterator[str]:
    m = config.model
    for name in ("layers", "hidden", "q_heads", "kv_heads", "head_dim", "ffn", "vocab", "max_context"):
        if getattr(m, name) < 1:
            yield f"model.{name}={getattr(m, name)}: at least 1"
    if m.kv_heads > 0 and m.q_heads % m.kv_heads:
        yield f"model.kv_heads={m.kv_heads} does not divide model.q_heads={m.q_heads}"
    if m.model_type not in MODEL_TYPES:
        yield f"model.model_type={m.model_type}: {nearest(m.model_type, MODEL_TYPES)}"
    if (m.model_type == "qwen2" and not m.qkv_bias) or (m.model_type == "mistral" and m.qkv_bias):
        yield f"model.qkv_bias={m.qkv_bias}: a {m.model_type} has {'no ' if m.qkv_bias else ''}biases on q, k and v"


def _protocol(config: Config) -> Iterator[str]:
    p = config.protocol
    least = {"context": 1, "batch_size": 1, "warmup_steps": 0, "measured_steps": 1, "seed": 0, "timeout_s": 1}
    for name, minimum in least.items():
        if getattr(p, name) < minimum:
            yield f"protocol.{name}={getattr(p, name)}: at least {minimum}"
    if p.threads is not None and p.threads < 1:
        yield f"protocol.threads={p.threads}: at least 1, or null for one a physical core"
    last = p.context + p.warmup_steps + p.measured_steps
    if last > config.model.max_context:
        yield (
            f"protocol.context={p.context} with {p.warmup_steps} + {p.measured_steps} steps ends at {last} tokens, "
            f"{config.model.name} takes {config.model.max_context}: "
            f"at most context={config.model.max_context - p.warmup_steps - p.measured_steps}"
        )


def _choices(config: Config) -> Iterator[str]:
    for key, value, known in (
        ("execution.name", config.execution.name, EXECUTIONS),
        ("execution.cache", config.execution.cache, CACHES),
    ):
        if value not in known:
            yield f"{key}={value}: {nearest(value, known)}"
    for name in ("weight_bits", "study_bits"):
        if not 0 < getattr(config.quant, name) <= 32:
            yield f"quant.{name}={getattr(config.quant, name)}: more than 0 and at most 32"
    if not config.records:
        yield "records is empty: name a folder"
    elif Path(config.records).exists() and not Path(config.records).is_dir():
        yield f"records={config.records} is no folder"


def _tracking(tracking: TrackingConfig) -> Iterator[str]:
    scheme = re.split(r"[+:]", tracking.uri, maxsplit=1)[0] if "://" in tracking.uri else ""
    if scheme not in (*DATABASES, *SERVERS):
        yield (
            f"tracking.uri={redact(tracking.uri)}: MLflow is reached by "
            f"{', '.join(f'{s}://' for s in (*DATABASES, *SERVERS))}; did you mean sqlite:///mlflow.db?"
        )
    elif scheme == "sqlite":
        yield from _sqlite(Path(tracking.uri.partition(":///")[2]), tracking.uri)
    elif not urlsplit(tracking.uri).netloc:
        yield f"tracking.uri={redact(tracking.uri)} names no host"


def _sqlite(file: Path, uri: str) -> Iterator[str]:
    import os

    parent = file.parent
    if not file.name or file.is_dir():
        yield f"tracking.uri={uri} names no file"
    elif not parent.is_dir():
        yield f"tracking.uri={uri}: there is no folder {parent}"
    elif not os.access(file if file.exists() else parent, os.W_OK):
        yield f"tracking.uri={uri} cannot be written"
    elif file.exists() and file.stat().st_size:
        with file.open("rb") as stream:
            if stream.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
                yield f"tracking.uri={uri}: {file} is no SQLite database"


def redact(uri: str) -> str:
    """`uri` without the password or token in it."""
    return re.sub(r"//[^/@]*@", "//***@", uri)

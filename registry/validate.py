"""What a configuration's values may be: everything that can be refused by looking at one cell's numbers."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from registry import parameters
from registry.device_lock import ON_BUSY
from registry.outcome import BadInput, Outcome, nearest
from registry.private import shared
from registry.redact import redact
from registry.schema import AUTO, COMPILE_MODES, GROUPS, OVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry.schema import Config, ExecutionConfig, GpuConfig, StudyFigure, TrackingConfig

EXECUTIONS = ("eager", "cuda_graph", "compile")
CACHES = ("dynamic", "static")
MEASURES = ("step", "attention")
"""What a cell may time: a whole decode step, or one attention kernel alone."""
SIDES = ("below", "above")
"""Of its threshold on which a claim may be dead."""
STUDY_FILES = ("cells", "pairs", "stack", "quant", "profile")
"""What an experiment's cells may be to the study, which names and fills their files differently (its appendix A)."""
SECTIONS = (
    "attention",
    "bandwidth",
    "batches",
    "cost",
    "matrix",
    "pairs",
    "profiles",
    "variants",
    "study",
    "steps",
)
"""What a report may be made of."""
NAME = re.compile(r"\w[\w.-]*")
MODEL_TYPES = ("qwen2", "llama", "mistral")
"""The Llama-shaped families whose tensors rfloor knows by name."""
BIASES = {"qwen2": True, "llama": False, "mistral": False}
"""Whether a family's q, k and v projections have biases. transformers can give a llama some, but then gives
its output projection one too, which is another architecture and another number of parameters."""
DRIVERS = {
    "sqlite": ("sqlite", "sqlite+pysqlite"),
    "postgresql": ("postgresql", "postgresql+psycopg2", "postgresql+psycopg"),
    "mysql": ("mysql+pymysql",),
    "mssql": ("mssql+pyodbc",),
}
"""Databases that MLflow takes -> how their addresses may begin. SQLAlchemy imports the driver that stands there."""
STORES = (
    "file",
    "s3",
    "r2",
    "b2",
    "gs",
    "wasbs",
    "abfss",
    "dbfs",
    "ftp",
    "sftp",
    "http",
    "https",
    "mlflow-artifacts",
)
"""Where MLflow itself can keep artifacts. Any other store it knows from a plugin of its own, but for HDFS, whose
client is a native library that is looked for at run time."""
ESCAPED = "a password's / @ : # ? are written %2F %40 %3A %23 %3F"
SERVERS = ("http", "https")
SQLITE_MAGIC = b"SQLite format 3\x00"
TARGET = "_target_"
"""The key under which Hydra looks for what it is to call."""
LARGEST = 2**63 - 1
"""Of any whole number: what a 64-bit register holds."""
LONGEST_S = 2_000_000
"""Of a cell's timeout: poll(2), in which its parent waits, counts milliseconds in 32 bits."""
MOST_THREADS = 1024
"""Of a process that computes: no host has more cores, and OpenMP ends the process where there is no room for their
stacks."""
MOST_PROFILED = 1000
"""Steps: a median needs no more, and the trace of each is written and read back."""


def validate(config: Config) -> None:
    """Refuse a cell whose values are out of range.

    Raises:
        BadInput: Every problem found, in one message.
    """
    plain = dataclasses.asdict(config)
    problems = [*map(naming_code, targets(plain)), *_numbers(plain)]
    if not problems:  # what is no number lies in no range
        problems += [*_model(config), *_gpu(config.gpu), *_protocol(config), *_choices(config), *_experiment(config)]
    problems += [*_names(config), *_tracking(config.tracking)]
    if problems:
        raise BadInput("; ".join(problems))


def validate_profile(gpu: GpuConfig) -> None:
    """Refuse a GPU profile that no floor can be computed from.

    Raises:
        BadInput: It has no bandwidth, or a number that is not positive.
    """
    problems = [*_numbers({"gpu": dataclasses.asdict(gpu)})] or [*_gpu(gpu)]
    if gpu.peak_bandwidth_gbs is None and not gpu.measure_bandwidth:
        problems.append(
            f"the GPU profile {gpu.name!r} has no bandwidth: give gpu.peak_bandwidth_gbs=... (GB/s, from its spec "
            "sheet) or gpu.measure_bandwidth=true"
        )
    if problems:
        raise BadInput("; ".join(problems))


def naming_code(key: str) -> str:
    """Why a key may not hold what Hydra would call."""
    return f"{key}: a configuration is data, it cannot name code to call ({TARGET})"


def targets(value: Any, key: str = "") -> Iterator[str]:
    """The keys under which a plain value holds what Hydra would call."""
    if isinstance(value, dict):
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            yield from (below,) if name == TARGET else targets(inner, below)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from targets(inner, f"{key}.{place}")


def _numbers(value: Any, key: str = "") -> Iterator[str]:
    """Numbers that no JSON file or no 64-bit register holds, wherever they stand."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _numbers(inner, f"{key}.{place}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}={value}: a finite number"
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield f"{key}: a whole number of at most {LARGEST}"


def _model(config: Config) -> Iterator[str]:
    m = config.model
    for name in ("layers", "hidden", "q_heads", "kv_heads", "head_dim", "ffn", "vocab", "max_context"):
        if getattr(m, name) < 1:
            yield f"model.{name}={getattr(m, name)}: at least 1"
    if m.kv_heads > 0 and m.q_heads % m.kv_heads:
        yield f"model.kv_heads={m.kv_heads} does not divide model.q_heads={m.q_heads}"
    if m.head_dim % 2:
        yield f"model.head_dim={m.head_dim}: a rotary embedding turns pairs, so it is even"
    for name in ("rope_theta", "rms_norm_eps"):
        if getattr(m, name) <= 0:
            yield f"model.{name}={getattr(m, name)}: more than 0"
    if m.model_type not in MODEL_TYPES:
        yield f"model.model_type={m.model_type}: {nearest(m.model_type, MODEL_TYPES)}"
    elif m.qkv_bias is not BIASES[m.model_type]:
        yield f"model.qkv_bias={m.qkv_bias}: a {m.model_type} has {'no ' if m.qkv_bias else ''}biases on q, k and v"


def _gpu(gpu: GpuConfig) -> Iterator[str]:
    for name in ("peak_bandwidth_gbs", "memory_gb", "price_usd_per_hour"):
        value = getattr(gpu, name)
        if value is not None and value <= 0:
            yield f"gpu.{name}={value}: more than 0, or null where it is not known"


def _protocol(config: Config) -> Iterator[str]:
    p = config.protocol
    least = {
        "context": 1,
        "batch_size": 1,
        "warmup_steps": 0,
        "measured_steps": 1,
        "sessions": 1,
        "seed": 0,
        "timeout_s": 1,
        "profiled_steps": 0,
    }
    for name, minimum in least.items():
        if getattr(p, name) < minimum:
            yield f"protocol.{name}={getattr(p, name)}: at least {minimum}"
    if p.timeout_s > LONGEST_S:
        yield f"protocol.timeout_s={p.timeout_s}: at most {LONGEST_S}, which is 23 days"
    if p.profiled_steps > MOST_PROFILED:
        yield f"protocol.profiled_steps={p.profiled_steps}: at most {MOST_PROFILED}"
    if p.threads is not None and not 1 <= p.threads <= MOST_THREADS:
        yield f"protocol.threads={p.threads}: 1 to {MOST_THREADS}, or null for one a physical core"
    if p.measures not in MEASURES:
        yield f"protocol.measures={p.measures}: {nearest(p.measures, MEASURES)}"
    if p.measures == "attention" and config.execution.cache not in (AUTO, "dynamic"):
        yield "an attention kernel alone is given a cache whose every row is valid: execution.cache=dynamic"
    last = p.context + (p.warmup_steps + p.measured_steps if p.measures == "step" else 1)
    if last > config.model.max_context:
        yield (
            f"protocol.context={p.context} with {p.warmup_steps} + {p.measured_steps} steps ends at {last} tokens, "
            f"{config.model.name} takes {config.model.max_context}: "
            f"at most context={config.model.max_context - p.warmup_steps - p.measured_steps}"
        )


def _experiment(config: Config) -> Iterator[str]:
    e = config.experiment
    told = f"experiment={e.name}"
    if not NAME.fullmatch(e.name):
        yield f"{told}: a name of letters, digits, dots, hyphens and underscores, which MLflow and files are found by"
    if e.arms is not None and (e.arms not in GROUPS or None in (e.baseline, e.candidate)):
        yield f"{told}: arms is one of {', '.join(GROUPS)}, and has a baseline and a candidate"
    if e.claims and e.arms is None:
        yield f"{told}: a claim is made of two arms, and none are named"
    for claim in e.claims:
        if claim.killed_if not in SIDES:
            yield f"{told}: killed_if={claim.killed_if}: {nearest(claim.killed_if, SIDES)}"
        if claim.speedup <= 0:
            yield f"{told}: speedup={claim.speedup}: more than 0"
    for figure in e.study:
        yield from (f"{told}: {problem}" for problem in _figure(figure))
    if e.study_files is not None and e.study_files not in STUDY_FILES:
        yield f"{told}: study_files={e.study_files}: {nearest(e.study_files, STUDY_FILES)}"
    for section in e.report:
        if section not in SECTIONS:
            yield f"{told}: no section of a report is called {section}: {nearest(section, SECTIONS)}"


def _figure(figure: StudyFigure) -> Iterator[str]:
    if figure.outcome:
        if figure.outcome not in [*Outcome]:
            yield f"outcome={figure.outcome}: {nearest(figure.outcome, [*Outcome])}"
        if figure.metric or figure.value is not None:
            yield f"the study's outcome {figure.outcome} is a figure of its own: no metric and no value beside it"
    elif not (figure.metric and figure.value):
        yield f"the study's {figure.metric or 'figure'} is {figure.value}, and a ratio to it is told"
    if figure.over and figure.over not in OVER:
        yield f"over={figure.over}: {nearest(figure.over, OVER)}"
    if figure.cells < 0:
        yield f"cells={figure.cells}: at least 1, or 0 for as many as it describes"


def _choices(config: Config) -> Iterator[str]:
    for key, value, known in (
        ("execution.launch", config.execution.launch, EXECUTIONS),
        ("execution.cache", config.execution.cache, (AUTO, *CACHES)),
        ("on_busy", config.on_busy, ON_BUSY),
    ):
        if value not in known:
            yield f"{key}={value}: {nearest(value, known)}"
    yield from _mode(config.execution)
    for name in ("weight_bits", "study_bits"):
        if not 0 < getattr(config.quant, name) <= 32:
            yield f"quant.{name}={getattr(config.quant, name)}: more than 0 and at most 32"
    if config.cache.limit_gb <= 0:
        yield f"cache.limit_gb={config.cache.limit_gb}: more than 0"
    for key, name in (("cache.folder", config.cache.folder), ("records", config.records)):
        if name:
            yield from _folder(key, name)
        else:
            yield f"{key} is empty: name a folder"


def _mode(execution: ExecutionConfig) -> Iterator[str]:
    """A mode that torch.compile does not know, or one that nobody would read."""
    told = f"execution.mode={execution.mode}"
    if execution.launch == "compile":
        if execution.mode not in COMPILE_MODES:
            yield f"{told}: {nearest(execution.mode or '', COMPILE_MODES)}"
    elif execution.mode is not None:
        yield f"{told}: a mode is torch.compile's, and execution={execution.name} has none, so use execution=compile"


def _folder(key: str, name: str) -> Iterator[str]:
    """Why nothing can be written into a folder that may have to be made."""
    try:
        there = Path(name)
        if key == "cache.folder":
            there = there.expanduser()
            if why := shared(there):
                yield f"{key}={name}: {why}"
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            yield f"{key}={name}: {there} is no folder"
        elif why := _unwritable(there):
            yield f"{key}={name} cannot be written: {why}"
    except (OSError, ValueError, RuntimeError) as error:  # the last: no such user
        yield f"{key}={name}: {error}"


def _unwritable(*places: Path) -> str:
    """Why the first of the files and folders there that cannot be written cannot; empty if all can be."""
    return next(filter(None, (_refusal(place.absolute()) for place in places if place.exists())), "")


@cache
def _refusal(place: Path) -> str:
    """What the system says to writing a file or into a folder: permissions alone say little to root."""
    try:
        if place.is_dir():
            with tempfile.TemporaryFile(dir=place):
                pass
        else:
            with place.open("r+b"):
                pass
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _names(config: Config) -> Iterator[str]:
    """Names are in labels, tables and MLflow's lists."""
    names = {f"{group}.name": getattr(config, group).name for group in GROUPS}
    for key, name in {**names, "tracking.experiment": config.tracking.experiment}.items():
        if (told := redact(name)) != name:
            yield f"{key}={told}: looks like a secret, and is shown everywhere"


def _tracking(tracking: TrackingConfig) -> Iterator[str]:
    uri = redact(tracking.uri)
    scheme = re.split(r"[+:]", tracking.uri, maxsplit=1)[0] if "://" in tracking.uri else ""
    if scheme not in (*DRIVERS, *SERVERS):
        yield (
            f"tracking.uri={uri}: MLflow is reached by "
            f"{', '.join(f'{s}://' for s in (*DRIVERS, *SERVERS))}; did you mean sqlite:///mlflow.db?"
        )
    elif scheme in DRIVERS and (problem := _driver(tracking.uri, scheme)):
        yield f"tracking.uri={uri}: {problem}"
    elif scheme == "sqlite":
        yield from _sqlite(_sqlite_path(tracking.uri), uri)
    else:
        yield from _address(tracking.uri, scheme in SERVERS)
    if not tracking.experiment.strip():
        yield "tracking.experiment is empty: name one"
    if tracking.artifacts and (told := redact(tracking.artifacts)) != tracking.artifacts:
        yield (
            f"tracking.artifacts={told}: MLflow would store the password with every run; give it in the environment, "
            "in the variables of the store's own client"
        )
    elif tracking.artifacts and "://" not in tracking.artifacts:
        yield from _folder("tracking.artifacts", tracking.artifacts)
    elif tracking.artifacts and (store := tracking.artifacts.partition("://")[0]) not in STORES:
        yield f"tracking.artifacts={tracking.artifacts}: {nearest(store, STORES)}"


def _driver(uri: str, scheme: str) -> str:
    """Why a database's address would have something loaded that it names itself; empty if it would not."""
    if (begins := uri.partition("://")[0]) not in DRIVERS[scheme]:
        return f"{nearest(begins, DRIVERS[scheme])}, and no other driver"
    behind = uri.partition("?")[2]
    if "@" in behind:  # up to which SQLAlchemy may look for a password, and who hides one does
        return f"an @ stands behind its ?; {ESCAPED}, and an @ of a parameter too"
    return parameters.problem(behind, scheme)


def _address(uri: str, server: bool) -> Iterator[str]:
    told = f"tracking.uri={redact(uri)}"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        yield f"{told} is no address; {ESCAPED}"
        return
    if server and not host:
        yield f"{told} names no host"
    elif not server and not parts.netloc and not parts.path.strip("/"):
        yield f"{told} names no database"
    elif port == 0:
        yield f"{told}: no server listens on port 0"
    elif server and (parts.query or parts.fragment):
        yield f"{told}: a server's address ends before its ? or #"


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite database, `None` where the address is that of something else."""
    return Path(_sqlite_path(uri)) if uri.startswith("sqlite") else None


def _sqlite_path(uri: str) -> str:
    return uri.partition(":///")[2].partition("?")[0]


def _sqlite(name: str, uri: str) -> Iterator[str]:
    told, file = f"tracking.uri={uri}", Path(name)
    try:
        if not file.name or name == ":memory:" or file.is_dir():
            yield f"{told} names no file"
        elif not file.parent.is_dir():
            yield f"{told}: there is no folder {file.parent}"
        # SQLite keeps its journal beside the database, so the folder has to be writable too.
        elif why := _unwritable(file.parent, file):
            yield f"{told} cannot be written: {why}"
        elif file.exists() and file.stat().st_size:
            with file.open("rb") as stream:
                if stream.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
                    yield f"{told}: {file} is no SQLite database"
    except (OSError, ValueError) as error:
        yield f"{told}: {error}"

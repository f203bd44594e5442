"""The typed configuration: one dataclass a config group, one `Config` that holds a cell.

The dataclasses are Hydra's structured configuration (`registry.compose` stores them) and, filled, the
plain objects that travel to the worker. Values live in `conf/`; what a value may be is said in
`registry.validate`. Nothing here imports anything heavy.
"""

from __future__ import annotations

import dataclasses
import statistics
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMPILE_MODES = {"default": False, "reduce-overhead": True, "max-autotune": True, "max-autotune-no-cudagraphs": False}
"""torch.compile's modes -> whether one records CUDA graphs."""

MISSING: Any = "???"  # OmegaConf's mark for a value that the YAML has to give


@dataclass
class ModelConfig:
    """The architecture's numbers, and where its weights come from."""

    name: str = MISSING
    model_type: str = MISSING
    layers: int = MISSING
    hidden: int = MISSING
    q_heads: int = MISSING
    kv_heads: int = MISSING
    head_dim: int = MISSING
    ffn: int = MISSING
    vocab: int = MISSING
    max_context: int = MISSING
    rope_theta: float = MISSING
    rms_norm_eps: float = MISSING
    qkv_bias: bool = MISSING
    tied_embeddings: bool = MISSING
    rope_scaling: dict[str, Any] | None = None
    source: str = MISSING
    weights: str = "random"
    revision: str | None = None


@dataclass
class GpuConfig:
    """A device as its maker sells it. Every number has a line in `sources`."""

    name: str = MISSING
    nvml_names: list[str] = field(default_factory=list)
    peak_bandwidth_gbs: float | None = None
    measure_bandwidth: bool = False
    memory_gb: float | None = None
    compute_capability: str | None = None
    price_usd_per_hour: float | None = None
    sources: dict[str, str] = field(default_factory=dict)


@dataclass
class BackendConfig:
    """Which plugin decodes. `auto` is what the quantisation runtime brings, else `hf`."""

    name: str = MISSING
    plugin: str = "${.name}"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class QuantConfig:
    """How linear layers are stored and multiplied."""

    name: str = MISSING
    plugin: str = "${.name}"
    backend: str | None = None
    weight_bits: float = 16.0
    study_bits: float = 16.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class AttentionConfig:
    """Which kernel attends to the cache in a decode step."""

    name: str = MISSING
    plugin: str = "${.name}"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ExecutionConfig:
    """How the step is launched, and on which cache.

    Attributes:
        name: What tables and records call it.
        launch: `eager`, `cuda_graph` or `compile`.
        cache: `dynamic`, `static`, or `auto`: dynamic where the body has such a one, else static.
        mode: torch.compile's, one of `COMPILE_MODES`; only `compile` takes one.
    """

    name: str = MISSING
    launch: str = "${.name}"
    cache: str = MISSING
    mode: str | None = None


@dataclass
class ProtocolConfig:
    """What is done, how often, and for how long at most."""

    name: str = MISSING
    context: int = MISSING
    batch_size: int = MISSING
    warmup_steps: int = MISSING
    measured_steps: int = MISSING
    seed: int = MISSING
    timeout_s: float = MISSING
    threads: int | None = None
    profiled_steps: int = 0
    sessions: int = 1
    measures: str = "step"


@dataclass
class TrackingConfig:
    """Where MLflow keeps the runs."""

    name: str = MISSING
    uri: str = MISSING
    experiment: str = MISSING
    artifacts: str | None = None


@dataclass
class ClaimConfig:
    """A threshold, fixed before anything is measured, beyond which a claim is dead.

    It holds for cells whose GPU has a spec bandwidth above `above_gbs` or below `below_gbs`, and whose
    configuration has the values of `where` (dotted keys).
    """

    claim: str = MISSING
    killed_if: str = MISSING
    speedup: float = MISSING
    above_gbs: float | None = None
    below_gbs: float | None = None
    where: dict[str, Any] = field(default_factory=dict)
    source: str = MISSING


OVER: dict[str, Callable[[list[float]], float]] = {"min": min, "median": statistics.median, "max": max}
"""What a figure of the study may be over several cells."""


@dataclass
class StudyFigure:
    """A figure of the study, for the cells of `gpu` whose configuration has the values of `where` (dotted keys).

    `metric` is one of a run's metrics, which stand for their median over the sessions, or of those of two arms, two
    cells or a GPU's cheapest cell (`registry.report.ours`). `over` says what was taken over several cells (`min`,
    `median`, `max`), and is empty for a figure of one cell; `cells` is over how many of those described the study
    took it, where it lacks some. In place of a metric's value the figure may be the `outcome` of its cells.
    """

    metric: str = ""
    value: float | None = None
    gpu: str = MISSING
    where: dict[str, Any] = field(default_factory=dict)
    over: str = ""
    source: str = MISSING
    outcome: str = ""
    cells: int = 0


@dataclass
class ExperimentConfig:
    """A named sweep with its question: which cells, which arms are paired, what was claimed, what is told of it.

    `cells` is a list of products, each an override's key and its values; `arms` names the group whose `baseline` and
    `candidate` are measured back to back in each session. `study_files` says what its cells are to the study
    (`registry.export`).
    """

    name: str = MISSING
    question: str = ""
    cells: list[dict[str, Any]] = field(default_factory=list)
    arms: str | None = None
    baseline: str | None = None
    candidate: str | None = None
    claims: list[ClaimConfig] = field(default_factory=list)
    study: list[StudyFigure] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    study_files: str | None = None


@dataclass
class CacheConfig:
    """Where quantised folders of random weights and compiled kernels are kept; the folders up to a size."""

    folder: str = "~/.cache/rfloor"
    limit_gb: float = 64.0


@dataclass
class Config:
    """One cell, as composed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    context: int | None = None
    records: str = "records"
    dry_run: bool = False
    resume: bool = False
    on_busy: str = "wait"
    sweep_id: str | None = None
    session: int = 0
    place: int = 0
    registration: str | None = None


AUTO = "auto"
"""A choice that is made once the plugins are known."""

GROUPS = ("model", "gpu", "backend", "quant", "attention", "execution", "protocol", "experiment", "tracking")
"""The config groups, in the order in which a cell is told."""

WHERE_TO = (
    "tracking",
    "cache",
    "context",
    "records",
    "dry_run",
    "resume",
    "on_busy",
    "sweep_id",
    "session",
    "place",
    "registration",
    "experiment",
)
"""Keys of a `Config` that say where a cell's runs go and who asks for it: not what is measured."""

UNTIMED = ("timeout_s", "profiled_steps")
"""Keys of the protocol that no step time depends on. A profile comes after the last timed step, where the kernels'
names are looked up in every run anyway: what is measured, and every figure of it, is the same with and without."""

NO_FIGURES = (
    *(("gpu", key) for key in ("nvml_names", "memory_gb", "compute_capability", "price_usd_per_hour", "sources")),
    *(("quant", key) for key in ("backend", "weight_bits")),
    ("model", "source"),
)
"""Group and key of what is said of a cell and enters no step and none of its figures: what its GPU is recognised by
and has room for, its price, which backend stands for `auto`, what the weights are expected to take, and where numbers
were read."""

T = TypeVar("T")


def what_is_measured(config: Config) -> dict[str, Any]:
    """A cell's configuration in its plain form, without where its runs go, what asks for it and how often."""
    plain = dataclasses.asdict(config)
    for key in WHERE_TO:
        del plain[key]
    del plain["protocol"]["sessions"]
    return plain


def what_decides(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cell's configuration in its plain form what its step times depend on."""
    found = {group: dict(part) if isinstance(part, dict) else part for group, part in plain.items()}
    for group, key in (*(("protocol", key) for key in UNTIMED), *NO_FIGURES):
        found.get(group, {}).pop(key, None)
    return found


def from_plain(cls: type[T], data: Any, where: str = "") -> T:
    """Rebuild a dataclass, and the dataclasses inside it, from what `dataclasses.asdict` made of it.

    Args:
        cls: The dataclass.
        data: Its plain form, as read back from JSON.
        where: The key under which it stands, and a full stop, for messages.

    Raises:
        TypeError: A field is unknown to `cls` or of another type, or one without a default is missing.
    """
    kind: Any = cls  # mypy takes no type for hashable
    hints = _hints(kind)
    found = cls(**{name: _typed(hints.get(name, ANYTHING), value, f"{where}{name}") for name, value in data.items()})
    for name in hints:
        if getattr(found, name) == MISSING:
            raise TypeError(f"no {where}{name}")
    return found


class Hint(NamedTuple):
    """What a value may be, taken apart once: thousands are held against the same few.

    Attributes:
        kinds: Its class, or `None` for anything.
        maybe: Whether it may be `None`.
        cls: The dataclass that a dict is the plain form of.
        inner: Of what it holds: a list's items, a dict's values.
    """

    kinds: type | tuple[type, ...] | None
    maybe: bool = False
    cls: type | None = None
    inner: Hint | None = None


ANYTHING = Hint(None)


@cache
def _hints(cls: type) -> dict[str, Hint]:
    return {name: _hint(hint) for name, hint in typing.get_type_hints(cls).items()}


def _hint(hint: Any) -> Hint:
    if hint is Any:
        return ANYTHING
    if type(None) in typing.get_args(hint):
        [hint] = [one for one in typing.get_args(hint) if one is not type(None)]
        return _hint(hint)._replace(maybe=True)
    inner, kind = typing.get_args(hint), typing.get_origin(hint) or hint
    cls = hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None
    kinds: Any = (int, float) if kind is float else kind
    return Hint(kinds, cls=cls, inner=_hint(inner[-1]) if inner and kind in (list, dict) else None)


def _typed(hint: Hint, value: Any, where: str) -> Any:
    """A value that is what its hint says, and the dataclasses in it rebuilt."""
    if hint.kinds is None or (value is None and hint.maybe):
        return value
    if hint.cls and isinstance(value, dict):
        return from_plain(hint.cls, value, f"{where}.")
    if not isinstance(value, hint.kinds) or (isinstance(value, bool) and hint.kinds is not bool):
        raise TypeError(f"{where} is a {type(value).__name__}")
    inner = hint.inner or ANYTHING
    if isinstance(value, list):
        return [_typed(inner, one, f"{where}.{place}") for place, one in enumerate(value)]
    if isinstance(value, dict):
        return {key: _typed(inner, one, f"{where}.{key}") for key, one in value.items()}
    return value

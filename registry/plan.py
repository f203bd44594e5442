"""From a configuration to a cell that can be sent to a worker, or to the reason why it cannot.

Checks run from cheap to dear, and what a machine cannot do comes before what it lacks: bad input refuses
the whole call, then the device, then what the plugins can do together, then missing packages, then
memory. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from packaging.requirements import Requirement as PackageRequirement

from registry import floor
from registry.api import HEAD, AttentionKernel, Backend, LinearFormat, Request
from registry.architecture import Architecture
from registry.environments import interpreter, version
from registry.hardware import Device, collect_versions, cpu_device
from registry.identity import cell_id, step_variables
from registry.kernel_cell import CACHES
from registry.outcome import BadInput, Outcome, Refusal, Refused, nearest, unsupported
from registry.plugins import KINDS
from registry.schema import AUTO, COMPILE_MODES
from registry.validate import CACHES as KINDS_OF_CACHE
from registry.validate import validate, validate_profile
from registry.weights import check_weights, hub_commit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from registry.api import Plugin
    from registry.plugins import Catalog, Claim
    from registry.schema import Config, GpuConfig

RUNTIME = ("rfloor", "torch", "transformers", "numpy", "nvidia-ml-py")
"""Packages whose versions belong to a cell's identity, beside those of its plugins."""

DYNAMIC, STATIC = KINDS_OF_CACHE


@dataclass
class Cell:
    """One planned cell.

    Attributes:
        config: Resolved: the GPU's profile and the backend's name stand where `auto` stood.
        device: The device that measures.
        targets: `module:Class` of each plugin, by kind.
        versions: Installed packages that matter.
        stored: How its weights are stored, where they lie in a folder; of a hub id the commit, where it is known.
        variables: Environment variables that change its steps.
        cell_id: Its identity.
        environment: The virtual environment that measures it; empty is this one.
        tags: What its backend wants its runs to bear.
        converts_head: Whether its format stores the LM head, too.
        refusal: Why it will not be measured; `None` if it can be.
    """

    config: Config
    device: Device
    targets: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=step_variables)
    cell_id: str = ""
    environment: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    converts_head: bool = False
    refusal: Refusal | None = None

    @property
    def architecture(self) -> Architecture:
        """The model, without its weights."""
        return Architecture.of(self.config.model)

    @property
    def experiment(self) -> str:
        """Name of the experiment that it is measured for; empty for none."""
        return self.config.experiment.name if self.config.experiment.cells else ""

    @property
    def kernel_alone(self) -> bool:
        """Whether an attention kernel is timed and not a step."""
        return self.config.protocol.measures == "attention"

    @property
    def capacity(self) -> int:
        """Tokens that the cache has to hold."""
        p = self.config.protocol
        return p.context + (1 if self.kernel_alone else p.warmup_steps + p.measured_steps)

    @property
    def mean_context(self) -> float:
        """Tokens that a measured step attends to, on average."""
        p = self.config.protocol
        return floor.mean_context(p.context, p.warmup_steps, p.measured_steps)

    @property
    def study_bytes(self) -> float:
        """W + K of the study's floor."""
        c = self.config
        return floor.study_bytes(self.architecture, c.quant.study_bits, self.mean_context, c.protocol.batch_size)

    @property
    def memory_need(self) -> float:
        """Bytes of stored weights and the full cache: the least that the device must hold."""
        c = self.config
        cache = floor.kv_bytes(self.architecture, self.capacity, c.protocol.batch_size)
        if self.kernel_alone:
            return cache / self.architecture.layers * CACHES
        return floor.stored_weight_bytes(self.architecture, c.quant.weight_bits, head=self.converts_head) + cache

    @property
    def label(self) -> str:
        """The cell in one line, for messages."""
        c = self.config
        # What a sweep compares comes first: MLflow's tables cut a name after some twenty characters.
        if self.kernel_alone:
            shape = f"{c.attention.name} {c.execution.name} {c.model.name} {c.gpu.name}"
            return f"{shape} attention alone ctx={c.protocol.context}"
        names = (c.quant, c.execution, c.attention, c.backend, c.model, c.gpu)
        return " ".join([*(part.name for part in names), f"ctx={c.protocol.context}"])


class Planner:
    """Plans cells for one machine.

    Args:
        catalog: The plugins.
        profiles: Every GPU profile, by name: what `gpu=auto` chooses from.
        device: The device that is here.
    """

    def __init__(self, catalog: Catalog, profiles: Mapping[str, GpuConfig], device: Device) -> None:
        self._catalog = catalog
        self._profiles = profiles
        self._device = device

    def plan(self, config: Config) -> Cell:
        """Check a cell and resolve what it leaves open.

        Raises:
            BadInput: The cell cannot be meant.
        """
        validate(config)
        backend = config.backend.name
        if backend == AUTO:
            config.backend.name = config.backend.plugin = config.quant.backend or "hf"
        claims, chosen, packages, refusals = self._claims(config)
        cell = Cell(config, self._device)
        if config.execution.cache == AUTO:
            only_static = "backend" in chosen and DYNAMIC not in chosen["backend"][0].caches
            config.execution.cache = STATIC if only_static and not cell.kernel_alone else DYNAMIC
        cell.targets = {kind: claim.target for kind, claim in claims.items()}
        try:
            _ask_beforehand(cell, chosen)
        except Refused as refused:
            refusals.append(refused)
        cell.versions = collect_versions([*RUNTIME, *packages], cell.environment)
        try:
            self._resolve_gpu(cell)
            for refusal in refusals:
                raise refusal
            (_check_kernel if cell.kernel_alone else _check_plugins)(cell, chosen)
            _check_memory(cell)
        except Refused as refused:
            cell.refusal = _open_to(config, refused.refusal)
        modules: dict[str, tuple[str, ...]] = {}
        for kind, target in cell.targets.items():
            module = target.partition(":")[0]
            modules[module] = modules.get(module, ()) + (chosen[kind][0].data if kind in chosen else ())
        cell.cell_id = cell_id(config, cell.device, modules, cell.versions, cell.stored, cell.variables)
        return cell

    def _claims(self, config: Config) -> tuple[dict[str, Claim], dict[str, tuple[Any, Any]], set[str], list[Refused]]:
        """The cell's plugins, each with its options checked, the packages behind them, and what fails so far."""
        claims, chosen, packages, refusals = {}, {}, set(), []
        for kind in KINDS:
            part = getattr(config, kind)
            try:
                claims[kind] = self._catalog.find(kind, part.plugin)
                packages.add(claims[kind].distribution)
                with _blamed(kind, part.plugin):
                    plugin = self._catalog.load(kind, part.plugin)
                    chosen[kind] = plugin, plugin_options(kind, plugin, part)
                    packages |= {PackageRequirement(requirement.package).name for requirement in plugin.requires}
            except Refused as refused:
                refusals.append(refused)
        return claims, chosen, packages, refusals

    def _resolve_gpu(self, cell: Cell) -> None:
        wanted, here = cell.config.gpu, self._device
        if here.unseen and not _is_cpu(wanted):
            raise Refused(
                Outcome.MISSING_DEPENDENCY,
                f"this machine has a GPU ({here.unseen}), and NVML, which tells which one, does not answer",
                "Install nvidia-ml-py and make nvidia-smi answer, or measure the CPU with gpu=cpu",
            )
        if wanted.name == AUTO:
            name = self._detect()
            if name is None:
                raise unsupported(
                    f"no GPU profile is for {here.name!r}",
                    "Write conf/gpu/NAME.yaml with its nvml_names and peak_bandwidth_gbs, or use gpu=cpu",
                )
            profile = self._profiles[name]
            given = {key: value for key, value in dataclasses.asdict(wanted).items() if value}
            cell.config.gpu = dataclasses.replace(profile, **(given | {"name": name}))
        validate_profile(cell.config.gpu)
        self._source_overrides(cell.config.gpu)
        if _is_cpu(cell.config.gpu):
            cell.device = cpu_device()
        elif here.kind != "cuda" or here.name not in cell.config.gpu.nvml_names:
            raise unsupported(
                f"gpu={wanted.name} is the profile of {' or '.join(cell.config.gpu.nvml_names) or 'no device'}, "
                f"this machine has {here.name}",
                _elsewhere(cell),
            )

    def _source_overrides(self, gpu: GpuConfig) -> None:
        """A number that the call gave is not the profile's, and does not bear the profile's source."""
        profile = self._profiles.get(gpu.name)
        if profile is None:
            return
        for name in ("peak_bandwidth_gbs", "memory_gb", "compute_capability", "price_usd_per_hour"):
            if getattr(gpu, name) != getattr(profile, name):
                gpu.sources = {**gpu.sources, name: "given in the call"}

    def _detect(self) -> str | None:
        if self._device.kind == "cpu":
            return "cpu"
        return next((n for n, p in self._profiles.items() if self._device.name in p.nvml_names), None)


def _is_cpu(gpu: GpuConfig) -> bool:
    """Whether a profile is the processor's, which any machine has."""
    return gpu.measure_bandwidth and not gpu.nvml_names


def _ask_beforehand(cell: Cell, chosen: dict[str, tuple[Any, Any]]) -> None:
    """What the plugins say that is needed before anything is checked: a folder's own settings, an environment."""
    config = cell.config
    if "quant" in chosen:
        plugin, options = chosen["quant"]
        with _blamed("quant", config.quant.plugin):
            quant = plugin(options)
            model = config.model
            cell.stored = check_weights(model.weights, cell.architecture, quant) or hub_commit(
                model.weights, model.revision
            )
            chosen["quant"] = plugin, quant.options  # with those settings of the folder that are options
            config.quant.options = dataclasses.asdict(quant.options)
            # An unquantised head has its bits either way, and is stored once.
            cell.converts_head = isinstance(quant, LinearFormat) and HEAD not in quant.keeps
    if "backend" in chosen:
        plugin, options = chosen["backend"]
        with _blamed("backend", config.backend.plugin):
            cell.environment, cell.tags = plugin.environment, dict(plugin.tags)


def _check_plugins(cell: Cell, chosen: Mapping[str, tuple[type[Plugin], Any]]) -> None:
    """What each plugin declares, what they can do together, what they say themselves, what they need."""
    requests = {kind: _request(cell, kind, chosen) for kind in chosen}
    for kind, (plugin, _) in chosen.items():
        with _blamed(kind, getattr(cell.config, kind).plugin):
            _check_declared(kind, plugin, requests[kind])
    _check_combination(chosen["backend"][0], chosen["quant"][0], requests["backend"])
    backend: Any = chosen["backend"][0]
    called = {kind: plugin for kind, (plugin, _) in chosen.items() if backend.hosting or not _hosted(plugin)}
    for kind, plugin in called.items():
        with _blamed(kind, getattr(cell.config, kind).plugin):
            plugin.check(requests[kind])
    if cell.environment and not interpreter(cell.environment).exists():
        raise Refused(
            Outcome.MISSING_DEPENDENCY,
            f"backend={cell.config.backend.name} runs in an environment of its own, and {cell.environment} is none",
            next((requirement.install for requirement in backend.requires), ""),
        )
    for plugin in called.values():
        _check_requirements(plugin, cell.environment)


def _check_kernel(cell: Cell, chosen: Mapping[str, tuple[type[Plugin], Any]]) -> None:
    """What stands against an attention kernel alone: no body and no format has a say.

    A call at one length can be captured whether or not the kernel reads the length from the device, so its declared
    executions are those of a step and do not count here.
    """
    kernel, execution = chosen["attention"][0], cell.config.execution.launch
    request = dataclasses.replace(_request(cell, "attention", chosen), execution="eager")
    if execution not in ("eager", "cuda_graph"):
        raise unsupported(
            f"an attention kernel alone is not launched by execution={execution}", "Use execution=eager"
        )
    with _blamed("attention", cell.config.attention.plugin):
        _check_declared("attention", kernel, request)
        _check_graph(execution, request.device)
        kernel.check(request)
    _check_requirements(kernel, "")


def _check_graph(execution: str, device: str) -> None:
    if execution == "cuda_graph" and device != "cuda":
        raise unsupported("execution=cuda_graph needs a CUDA device, this one is the CPU", "Use execution=eager")


def _hosted(plugin: type[Plugin]) -> bool:
    """Whether a plugin's code is called by the body that hosts it, and by no other."""
    return issubclass(plugin, LinearFormat | AttentionKernel)


@contextmanager
def _blamed(kind: str, name: str) -> Iterator[None]:
    """What a plugin's own code raises ends its cell and no other."""
    try:
        yield
    except (BadInput, Refused):
        raise
    except (Exception, SystemExit) as error:
        raise Refused(
            Outcome.CRASH, f"asking the {kind} plugin {name!r} raised {type(error).__name__}: {error}"
        ) from error


def plugin_options(kind: str, plugin: type[Plugin], config: Any) -> Any:
    """The plugin's options, checked against its own dataclass and given back in its types."""
    known = [f.name for f in dataclasses.fields(plugin.Options)]
    for name in config.options:
        if name not in known:
            raise BadInput(f"{config.name} has no option {kind}.options.{name}: {nearest(name, known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(plugin.Options), config.options)
        options: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise BadInput(f"{kind}.options: {str(error).splitlines()[0]}") from error
    config.options = dataclasses.asdict(options)
    return options


def _request(cell: Cell, kind: str, chosen: Mapping[str, tuple[type[Plugin], Any]]) -> Request:
    c = cell.config
    options = {name: own for name, (_, own) in chosen.items()}
    return Request(
        architecture=cell.architecture,
        backend=c.backend.plugin,
        quant=c.quant.plugin,
        attention=c.attention.plugin,
        execution=c.execution.launch,
        mode=c.execution.mode,
        cache=c.execution.cache,
        batch_size=c.protocol.batch_size,
        capacity=cell.capacity,
        device=cell.device.kind,
        capability=cell.device.capability,
        options=options[kind],
        quant_options=options["quant"],
        attention_options=options["attention"],
    )


def _check_declared(kind: str, plugin: type[Plugin], request: Request) -> None:
    name, other = f"the {kind} plugin {getattr(request, kind)!r}", f"Use another {kind} here"
    if request.device not in plugin.devices:
        wanted = " and ".join(plugin.devices)
        raise unsupported(f"{name} runs on {wanted}, this device is {request.device}", other)
    if plugin.min_capability and request.capability and request.capability < plugin.min_capability:
        least, found = (".".join(map(str, c)) for c in (plugin.min_capability, request.capability))
        raise unsupported(f"{name} needs compute capability {least}, this device has {found}", other)
    if request.execution not in plugin.executions:
        raise unsupported(
            f"{name} cannot be launched by execution={request.execution}",
            f"Use {' or '.join(f'execution={execution}' for execution in plugin.executions)}",
        )
    if _records_graphs(request) and "cuda_graph" not in plugin.executions:
        raise unsupported(
            f"{name} cannot be captured, and execution.mode={request.mode} records CUDA graphs",
            "Use execution.mode=default",
        )
    if request.cache not in plugin.caches:
        raise unsupported(
            f"{name} works on a {' or '.join(plugin.caches)} cache, not on a {request.cache} one",
            f"Use {' or '.join(f'execution.cache={cache}' for cache in plugin.caches)}",
        )


def _records_graphs(request: Request) -> bool:
    """Whether torch.compile is asked for CUDA graphs where there can be some."""
    return request.execution == "compile" and request.device == "cuda" and COMPILE_MODES[request.mode or "default"]


def _check_combination(backend: type[Plugin], quant: type[Plugin], request: Request) -> None:
    assert issubclass(backend, Backend)
    if not issubclass(quant, LinearFormat) and request.quant not in (backend.formats or ()):
        raise unsupported(
            f"quant={request.quant} is the storage of a runtime with a body of its own, "
            f"and backend={request.backend} does not read it",
            "Use backend=auto",
        )
    _check_graph(request.execution, request.device)
    if request.execution == "cuda_graph" and request.cache != "static":
        raise unsupported(
            "a captured step needs a cache that stays where it is, this one is dynamic",
            "Use execution.cache=static",
        )
    if _records_graphs(request) and request.cache != "static":
        raise unsupported(
            f"execution.mode={request.mode} would record a CUDA graph for every length of a dynamic cache",
            "Use execution.cache=static, or execution.mode=default",
        )
    for kind, hosted, name in (
        ("quant", backend.formats, request.quant),
        ("attention", backend.attentions, request.attention),
    ):
        if hosted is not None and name not in hosted:
            raise unsupported(
                f"backend={request.backend} does not host {kind}={name}",
                f"It hosts {', '.join(hosted) or 'none'}",
            )


def _check_requirements(plugin: type[Plugin], environment: str) -> None:
    for requirement in plugin.requires:
        wanted = PackageRequirement(requirement.package)
        found = version(wanted.name, environment)
        if found is None:
            raise Refused(Outcome.MISSING_DEPENDENCY, f"{wanted.name} is not installed", requirement.install)
        if not wanted.specifier.contains(found, prereleases=True):
            raise Refused(
                Outcome.MISSING_DEPENDENCY,
                f"{wanted.name} {found} is installed, {requirement.package} is needed",
                requirement.install,
            )


def _open_to(config: Config, refusal: Refusal) -> Refusal:
    """A refusal without a remedy that an experiment, which compares both arms, would refuse."""
    fixed = config.experiment.arms
    return dataclasses.replace(refusal, remedy="") if fixed and f"{fixed}=" in refusal.remedy else refusal


def _elsewhere(cell: Cell) -> str:
    """What to do with a cell of another machine's profile."""
    has = cell.config.gpu.memory_gb
    if has and cell.memory_need > has * floor.GB:
        return f"It would not run there either: it needs {cell.memory_need / floor.GB:.1f} GB, which has {has:g} GB"
    return "Use gpu=auto here, or run this cell there"


def _check_memory(cell: Cell) -> None:
    if cell.memory_need > cell.device.memory_bytes:
        raise Refused(
            Outcome.OOM,
            f"weights and cache need {cell.memory_need / floor.GB:.1f} GB, "
            f"{cell.device.name} has {cell.device.memory_bytes / floor.GB:.1f} GB",
            "Use a smaller model or context, or a quant with fewer bits",
        )

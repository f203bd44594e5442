"""The child process of one cell: load, check, measure, answer with one JSON file.

    python -m registry.worker ANSWER < REQUEST

REQUEST is the JSON of a `Request`, which may hold secrets; the answer holds none. What begins is told, a line each,
on the file descriptor that the environment names in RFLOOR_STAGES. Everything printed goes to the cell's log. The
process never unpickles anything and ends with 0 whenever it wrote an answer, with `UNWRITTEN` if it could not.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import faults
from registry.failures import out_of_memory, telling_line
from registry.hardware import contexts, load, physical_cores
from registry.outcome import BadInput, Outcome, Refused
from registry.record import write_json
from registry.redact import Redactor, environment_secrets, known_secrets
from registry.schema import Config, from_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGES_FD = "RFLOOR_STAGES"
PARENT = "RFLOOR_PARENT"
"""Environment variable: the PID of the process that waits for this one."""
PR_SET_PDEATHSIG = 1  # prctl(2)
UNWRITTEN = os.EX_IOERR


@dataclass
class Request:
    """What the parent asks for.

    Attributes:
        config: The resolved cell.
        device: `cpu` or `cuda`.
        targets: `module:Class` of each plugin, by kind.
        mean_context: Tokens that a measured step attends to on average.
        trace: Where the trace of profiled steps goes, in a folder of the parent's.
    """

    config: Config
    device: str
    targets: dict[str, str] = field(default_factory=dict)
    mean_context: float = 0.0
    trace: str = ""


_begun: list[tuple[str, float]] = []


def stage(name: str) -> None:
    """Tell the parent what begins, and remember when."""
    _begun.append((name, time.monotonic()))
    tell(name)


def tell(name: str) -> None:
    """Tell the parent how far a stage is."""
    descriptor = os.environ.get(STAGES_FD)
    if descriptor:
        os.write(int(descriptor), f"{name}\n".encode())


def _durations() -> dict[str, float]:
    """Seconds that each stage has taken, in order."""
    ends = [begin for _, begin in _begun[1:]] + [time.monotonic()]
    taken: dict[str, float] = {}
    for (name, begin), end in zip(_begun, ends, strict=True):
        taken[name] = round(taken.get(name, 0.0) + end - begin, 3)
    return taken


def answer(request: Request) -> dict[str, Any]:
    """Measure the cell.

    Returns:
        The raw measurement, for `registry.metrics`.

    Raises:
        Refused: The cell ends with a typed outcome.
    """
    stage("import")
    import torch

    from registry.kernels import require
    from registry.measure import read_bandwidth

    found = load() if request.device == "cuda" else {}  # before this process touches the device
    config, protocol = request.config, request.config.protocol
    if request.device == "cuda" and not torch.cuda.is_available():
        raise Refused(
            Outcome.MISSING_DEPENDENCY,
            f"this machine has {config.gpu.name}, and torch {torch.__version__} cannot use it",
            "Install a CUDA build of torch that fits the driver",
        )
    threads = protocol.threads or physical_cores()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        build(request)
        measured = _kernel(request) if protocol.measures == "attention" else _step(request)
        require(measured["kernels"], _wanted(request))
        stage("bandwidth")
        gc.collect()
        if request.device == "cuda":
            torch.cuda.empty_cache()
        measured["read_bandwidth_gbs"] = read_bandwidth(request.device)
    others = {"load_before": found, "contexts_after": contexts() if found else None}
    return measured | others | {"threads": threads, "torch": _describe_torch(), "stages_s": _durations()}


def _step(request: Request) -> dict[str, Any]:
    """Check and time a whole decode step."""
    from registry.fidelity import LAYERS, compare
    from registry.measure import measure

    config, protocol = request.config, request.config.protocol
    with factory(request) as make:
        stage("check")
        fidelity = compare(make(LAYERS), protocol.seed).require()
        stage("load")
        backend = make(None)
        backend.load(protocol.context + protocol.warmup_steps + protocol.measured_steps)
        trace = Path(request.trace) if request.trace else None
        measured = measure(backend, config.execution, protocol, request.mean_context, stage, trace)
        backend.close()
    return measured | {"fidelity": fidelity}


def _kernel(request: Request) -> dict[str, Any]:
    """Check and time the attention kernel alone."""
    from registry.api import Architecture
    from registry.kernel_cell import measure_kernel

    config = request.config
    [(_, plugin, options)] = _called(request)
    architecture = Architecture.of(config.model)
    return measure_kernel(
        plugin(options), architecture, config.protocol, config.execution.launch, request.device, stage
    )


def build(request: Request) -> None:
    """Let the plugins compile what compiles at its first use.

    Raises:
        Refused: A compiler failed: `missing_dependency`, with the last thing it said.
    """
    for _, plugin, options in _called(request):
        what = plugin.builds(options, request.device)
        if not what:
            continue
        stage(f"build {what} (kept; minutes the first time)")
        try:
            plugin.build(options, request.device)
        except Refused:
            raise
        except Exception as error:
            traceback.print_exception(error)
            raise Refused(Outcome.MISSING_DEPENDENCY, f"{what} cannot be compiled: {telling_line(error)}") from error


def _called(request: Request) -> Iterator[tuple[str, Any, Any]]:
    """The plugins whose code a step runs, each with its kind and options."""
    from registry.plugins import load_target

    if request.config.protocol.measures == "attention":
        kinds = ["attention"]
    else:
        kinds = [*request.targets] if load_target(request.targets["backend"]).hosting else ["backend"]
    for kind, target in request.targets.items():
        if kind in kinds:
            plugin: Any = load_target(target)
            yield kind, plugin, plugin.Options(**getattr(request.config, kind).options)


def _wanted(request: Request) -> list[tuple[str, str]]:
    """The kernels that the plugins want to see."""
    return [
        (f"{kind}={getattr(request.config, kind).name}", pattern)
        for kind, plugin, options in _called(request)
        for pattern in plugin.kernel_names(options, request.device)
    ]


@contextmanager
def factory(request: Request) -> Iterator[Callable[[int | None], Any]]:
    """A function that makes the cell's backend for its first n layers, or for all of them."""
    import torch

    from registry.api import Architecture, CheckpointFormat, Setup
    from registry.cache import random_checkpoint
    from registry.plugins import load_target
    from registry.weights import FolderWeights, RandomWeights, check_biases, check_folder, open_weights

    config = request.config
    plugins: dict[str, Any] = {kind: load_target(target) for kind, target in request.targets.items()}
    options = {kind: plugin.Options(**getattr(config, kind).options) for kind, plugin in plugins.items()}
    weights = open_weights(config.model.weights, config.model.revision, config.protocol.seed)
    whole = Architecture.of(config.model)

    def quant() -> Any:
        return plugins["quant"](options["quant"])

    def make(layers: int | None) -> Any:
        linear = quant()
        if isinstance(weights, FolderWeights):  # its settings; and a model of the hub is seen here for the first time
            check_folder(weights.folder, whole, linear)
        return plugins["backend"](
            Setup(
                architecture=whole.cut(layers) if layers else whole,
                weights=weights,
                device=request.device,
                dtype=torch.bfloat16,
                batch_size=config.protocol.batch_size,
                cache=config.execution.cache,
                linear=linear,
                attention=plugins["attention"](options["attention"]),
                options=options["backend"],
            )
        )

    form = quant()
    if isinstance(weights, RandomWeights) and isinstance(form, CheckpointFormat):
        told = partial(stage, f"synthesize {config.quant.name} weights")
        with random_checkpoint(config.cache, whole, weights.seed, form, request.device, told, tell) as folder:
            weights = FolderWeights(folder)
            yield make
    else:
        if isinstance(weights, FolderWeights):
            check_biases(weights, whole)
        yield make


def _describe_torch() -> dict[str, Any]:
    import torch

    described: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return described


def failure(error: BaseException) -> dict[str, Any]:
    """The answer that an exception makes; its traceback goes to the log."""
    if isinstance(error, Refused):
        return {
            "outcome": error.refusal.outcome,
            "reason": error.refusal.reason,
            "remedy": error.refusal.remedy,
        }
    traceback.print_exception(error)
    first = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, BadInput):
        return {"outcome": Outcome.UNSUPPORTED, "reason": first}
    if out_of_memory(error):
        return {"outcome": Outcome.OOM, "reason": first or "out of memory"}
    return {"outcome": Outcome.CRASH, "reason": f"{type(error).__name__}: {first}"}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no orphan holds the GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ.get(PARENT, str(os.getppid())):  # it died before
        os._exit(1)


def main(arguments: list[str]) -> int:
    """Answer one request."""
    die_with_parent()
    [answer_file] = map(Path, arguments)
    known = environment_secrets(os.environ)
    try:
        asked = json.loads(sys.stdin.buffer.read())
        known |= known_secrets(asked)
        request = from_plain(Request, asked)
        content = {"outcome": Outcome.OK, **answer(request)}
    except BaseException as error:  # whatever it is, the parent gets an answer with its name
        content = failure(error)
    try:
        faults.disk(faults.ANSWER_FULL)
        write_json(answer_file, Redactor(known).plain(content))
    except OSError as error:
        print(f"the answer cannot be written: {error}")
        return UNWRITTEN
    return 0


def to_json(request: Request) -> str:
    """The request as `main` reads it."""
    return json.dumps(dataclasses.asdict(request))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

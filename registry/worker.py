"""The child process of one cell: load, check, measure, answer with one JSON file.

    python -m registry.worker REQUEST ANSWER

REQUEST is the JSON of a `Request`; what begins is told, a line each, on the file descriptor that the
environment names in RFLOOR_STAGES. Everything printed goes to the cell's log. The process never unpickles
anything and ends with 0 whenever it wrote an answer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.hardware import physical_cores
from registry.outcome import BadInput, Outcome, Refused
from registry.record import write_json
from registry.schema import Config, from_plain

STAGES_FD = "RFLOOR_STAGES"
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class Request:
    """What the parent asks for.

    Attributes:
        config: The resolved cell.
        device: `cpu` or `cuda`.
        targets: `module:Class` of each plugin, by kind.
        mean_context: Tokens that a measured step attends to on average.
    """

    config: Config
    device: str
    targets: dict[str, str] = field(default_factory=dict)
    mean_context: float = 0.0


def stage(name: str) -> None:
    """Tell the parent what begins."""
    descriptor = os.environ.get(STAGES_FD)
    if descriptor:
        os.write(int(descriptor), f"{name}\n".encode())


def answer(request: Request) -> dict[str, Any]:
    """Measure the cell.

    Returns:
        The raw measurement, for `registry.metrics`.

    Raises:
        Refused: The cell ends with a typed outcome.
    """
    stage("import")
    import torch

    from registry.fidelity import LAYERS, compare
    from registry.measure import measure, read_bandwidth

    config, protocol = request.config, request.config.protocol
    if request.device == "cuda" and not torch.cuda.is_available():
        raise Refused(
            Outcome.MISSING_DEPENDENCY,
            f"this machine has {config.gpu.name}, and torch {torch.__version__} cannot use it",
            "Install a CUDA build of torch that fits the driver",
        )
    threads = protocol.threads or physical_cores()
    torch.set_num_threads(threads)
    make = _factory(request)
    with torch.inference_mode():
        stage("check")
        fidelity = compare(make(LAYERS), protocol.seed).require()
        stage("load")
        backend = make(None)
        backend.load(protocol.context + protocol.warmup_steps + protocol.measured_steps)
        measured = measure(backend, config.execution.name, protocol, request.mean_context, stage)
        stage("bandwidth")
        backend.close()
        del backend
        gc.collect()
        if request.device == "cuda":
            torch.cuda.empty_cache()
        measured["read_bandwidth_gbs"] = read_bandwidth(request.device)
    return measured | {"fidelity": fidelity, "threads": threads, "torch": _describe_torch()}


def _factory(request: Request) -> Any:
    """A function that makes the cell's backend for its first n layers, or for all of them."""
    import torch

    from registry.api import Architecture, Setup
    from registry.plugins import load_target
    from registry.weights import FolderWeights, check_folder, open_weights

    config = request.config
    plugins: dict[str, Any] = {kind: load_target(target) for kind, target in request.targets.items()}
    options = {kind: plugin.Options(**getattr(config, kind).options) for kind, plugin in plugins.items()}
    weights = open_weights(config.model.weights, config.model.revision, config.protocol.seed)
    whole = Architecture.of(config.model)
    if isinstance(weights, FolderWeights):
        check_folder(weights.folder, whole)  # a model of the hub is seen here for the first time

    def make(layers: int | None) -> Any:
        return plugins["backend"](
            Setup(
                architecture=whole.cut(layers) if layers else whole,
                weights=weights,
                device=request.device,
                dtype=torch.bfloat16,
                batch_size=config.protocol.batch_size,
                cache=config.execution.cache,
                linear=plugins["quant"](options["quant"]),
                attention=plugins["attention"](options["attention"]),
                options=options["backend"],
            )
        )

    return make


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "CUDA error: out of memory" in str(error)
    )


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no orphan holds the GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """Answer one request."""
    die_with_parent()
    request_file, answer_file = map(Path, arguments)
    try:
        request = from_plain(Request, json.loads(request_file.read_text(encoding="utf-8")))
        content = {"outcome": Outcome.OK, **answer(request)}
    except BaseException as error:  # whatever it is, the parent gets an answer with its name
        content = failure(error)
    write_json(answer_file, content)
    return 0


def to_json(request: Request) -> str:
    """The request as `main` reads it."""
    return json.dumps(dataclasses.asdict(request))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

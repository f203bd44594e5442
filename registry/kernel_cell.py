"""One attention kernel alone: what a call of it costs the host and the device, outside of any model.

A call attends with one token a stream to a cache of which every row is valid. The calls rotate over the caches of
`CACHES` layers, as a step does, so that keys and values come from memory and not from the L2 cache. Each call's
output on the first and last cache is held against softmax attention in float32 before anything is timed. Eagerly a
call is timed with a synchronise around it, and again by device events with the host running ahead; as a graph one
rotation is captured, and what a replay takes is divided by its calls.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from registry.capture import capture
from registry.kernels import seen
from registry.measure import event_pass, load_beside, quiet, wall_pass
from registry.outcome import Outcome, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from registry.api import Architecture, AttentionKernel
    from registry.schema import ProtocolConfig

CACHES = 32
"""What the calls rotate over: as many as the layers of the shape that the study calls its kernels on."""
MIN_COSINE = 0.999
MAX_ERROR = 0.02
"""Of a bf16 output against float32 attention: the largest difference over the largest value."""


def measure_kernel(
    kernel: AttentionKernel,
    architecture: Architecture,
    protocol: ProtocolConfig,
    execution: str,
    device: str,
    stage: Callable[[str], None],
) -> dict[str, Any]:
    """Check and time an attention kernel at a model's shape.

    Args:
        kernel: Not yet planned.
        architecture: Gives heads and their width.
        protocol: Context (the cache has one row more, the token's own), batch, calls and seed.
        execution: `eager` or `cuda_graph`.
        device: `cpu` or `cuda`.
        stage: Told what begins.

    Returns:
        Times in microseconds and what was counted beside them, ready for JSON.

    Raises:
        Refused: `incorrect`, or `unsupported` where a call cannot be captured.
    """
    import torch

    from registry.api import AttentionShape

    a, rows = architecture, protocol.context + 1
    stage("load")
    heads = a.q_heads, a.kv_heads, a.head_dim
    kernel.plan(AttentionShape(protocol.batch_size, *heads, rows, torch.bfloat16, device, "dynamic"))
    q, caches = _tensors(architecture, protocol, rows, device)
    scale = 1 / math.sqrt(a.head_dim)

    def call(cache: tuple[Tensor, Tensor]) -> Tensor:
        return kernel.decode(q, *cache, kv_len=None, scale=scale)

    stage("check")
    with _choices() as enabled:
        fidelity = _worst(_against_float32(call(cache), q, *cache, scale) for cache in (caches[0], caches[-1]))
    stage(f"prepare {execution}")
    if execution == "cuda_graph":
        launch, calls = _captured(call, caches), len(caches)
    else:
        rotation = cycle(caches)
        launch, calls = (lambda: call(next(rotation))), 1
    stage("measure")
    beside = load_beside(device)
    with quiet():
        times = wall_pass(launch, protocol, device)
        events = event_pass(launch, protocol) if device == "cuda" else None
    stage("kernels")
    kernels = seen(launch, device)
    per_call = 1e3 / calls
    return {
        "call_times_us": [milliseconds * per_call for milliseconds in times],
        "event_call_times_us": [milliseconds * per_call for milliseconds in events] if events else None,
        "calls_a_launch": calls,
        "rotated_bytes": sum(tensor.nbytes for cache in caches for tensor in cache),
        "call_bytes": sum(tensor.nbytes for tensor in caches[0]) + 2 * q.nbytes,
        "fidelity": fidelity,
        "kernels": kernels,
        "sdp_enabled": enabled,
        "load_window": beside,
    }


def _tensors(
    a: Architecture, protocol: ProtocolConfig, rows: int, device: str
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One query and `CACHES` caches of random numbers, laid out as a model hands them over."""
    import torch

    numbers = torch.Generator(device).manual_seed(protocol.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers, device=device, dtype=torch.bfloat16)

    batch = protocol.batch_size
    q = random(batch, 1, a.q_heads, a.head_dim).transpose(1, 2)
    shape = (batch, a.kv_heads, rows, a.head_dim)
    return q, [(random(*shape), random(*shape)) for _ in range(CACHES)]


def _against_float32(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, float]:
    """Cosine with, and largest relative difference from, softmax attention in float32."""
    from torch.nn.functional import cosine_similarity

    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    expected = (q.float() @ keys.mT).mul(scale).softmax(-1) @ values
    found = out.float()
    cosine = cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    error = (found - expected).abs().max() / expected.abs().max()
    return {"output_cosine": float(cosine), "output_error": float(error)}


def _worst(found: Iterator[dict[str, float]]) -> dict[str, float]:
    """The worst of several checks.

    Raises:
        Refused: It is not good enough.
    """
    checks = [*found]
    cosine = min(check["output_cosine"] for check in checks)
    error = max(check["output_error"] for check in checks)
    if not (cosine >= MIN_COSINE and error <= MAX_ERROR):  # a NaN is neither
        raise Refused(
            Outcome.INCORRECT,
            f"the kernel's output has a cosine of {cosine:.5f} and an error of {error:.4f} against float32 "
            f"attention; at least {MIN_COSINE} and at most {MAX_ERROR} are asked",
        )
    return {"output_cosine": cosine, "output_error": error}


def _captured(call: Callable[[tuple[Tensor, Tensor]], Tensor], caches: list[tuple[Tensor, Tensor]]) -> Any:
    """A launch of one graph that holds a call for each cache.

    Raises:
        Refused: The kernel needs the host in a call.
    """
    import torch

    checked = (0, len(caches) - 1)
    expected = {index: call(caches[index]).clone() for index in checked}
    out, rotation = dict(expected), cycle(caches)

    def every() -> None:
        for index, cache in enumerate(caches):
            made = call(cache)
            if index in checked:
                out[index] = made

    graph = capture("a call of the kernel", lambda: call(next(rotation)), every)
    for one in out.values():
        one.zero_()
    graph.replay()
    for index, wanted in expected.items():
        bound = MAX_ERROR * float(wanted.abs().max())
        if not torch.allclose(out[index].float(), wanted.float(), rtol=0, atol=bound):
            raise Refused(Outcome.INCORRECT, "a replay of the captured calls does not give what the calls gave")
    return graph.replay


@contextmanager
def _choices() -> Iterator[dict[str, bool]]:
    """Which kernels scaled_dot_product_attention may choose from, as the last call in this context finds it.

    Yields:
        By kernel; empty where nothing calls it.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    found: dict[str, bool] = {}

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is scaled_dot_product_attention:
                found.update(_sdp_enabled())
            return func(*args, **(kwargs or {}))

    with Watching():
        yield found


def _sdp_enabled() -> dict[str, bool]:
    """Which kernels PyTorch's scaled_dot_product_attention may choose from."""
    from torch.backends import cuda

    return {
        "flash": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "efficient": cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn": cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math": cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
    }

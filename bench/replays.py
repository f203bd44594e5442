"""A fused step captured in a CUDA graph, and how long its replays take."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from registry.capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends.fused.body import FusedBackend

ROOM = 35
"""Rows of the cache behind the context."""
REPLAYS, REPEATS = 20, 3


def zeros(backend: FusedBackend) -> torch.Tensor:
    """A token a stream."""
    return torch.zeros(backend.setup.batch_size, dtype=torch.int64, device=backend.setup.device)


def captured(backend: FusedBackend) -> Any:
    token = zeros(backend)

    def step() -> None:
        backend.decode_step(token)

    return capture("the step", step, step)


def replayed_ms(graph: Any, begin: Callable[[], None]) -> float:
    """Replays, back to back: the median of some means.

    Args:
        graph: As `captured` gives it.
        begin: Called before each series of replays: the cache has no room for all of them.
    """
    times: list[float] = []
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(REPEATS):
        begin()
        first.record()
        for _ in range(REPLAYS):
            graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / REPLAYS)
    return statistics.median(times)

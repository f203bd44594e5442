"""Recording a CUDA graph, the same for a whole step and for one kernel's calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.outcome import unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

WARMUPS = 3
"""Runs on a side stream before a capture, as PyTorch's documentation of CUDA graphs asks for."""


def capture(what: str, warm_up: Callable[[], object], launch: Callable[[], object]) -> Any:
    """A graph that holds what `launch` launches.

    Args:
        what: For a message.
        warm_up: Runs it once, and leaves everything as it was.
        launch: What is recorded; it is not run.

    Returns:
        A `torch.cuda.CUDAGraph`.

    Raises:
        Refused: `unsupported`: it needs the host.
    """
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError as error:
        raise unsupported(
            f"{what} cannot be captured: {str(error).splitlines()[0]}", "Use execution=eager"
        ) from error
    return graph

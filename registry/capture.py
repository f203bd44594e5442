"""Recording a CUDA graph, the same for a whole step and for one kernel's calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.failures import out_of_memory
from registry.outcome import unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        RuntimeError: As it came, where memory ran out or the device itself reports an error.
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
        # The end of a capture that failed says only that it did; what made it fail is the context of that.
        for cause in _chain(error):
            if out_of_memory(cause) or (isinstance(cause, torch.AcceleratorError) and "captur" not in str(cause)):
                raise cause from None
        raise unsupported(
            f"{what} cannot be captured: {str(error).splitlines()[0]}", "Use execution=eager"
        ) from error
    return graph


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those during whose handling it was raised."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__

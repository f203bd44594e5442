"""How a step is launched, for every backend alike.

A step is the model's forward for one token, greedy argmax on the device, and feeding that token back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from registry.outcome import Outcome, Refused
from registry.proof import eager_logits, prove

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import Backend

CAPTURE_WARMUPS = 3
"""Side-stream steps before a capture, as PyTorch's documentation of CUDA graphs asks for."""


class Execution(ABC):
    """Steps a backend from a position on.

    Args:
        backend: Loaded and prefilled.
        first_token: int64 `[batch]`, what the prefill chose.
        position: Tokens in the cache after the prefill; every `rewind` comes back to it.
        room: Steps that the cache has room for.
    """

    name: ClassVar[str]

    def __init__(self, backend: Backend, first_token: Tensor, position: int, room: int) -> None:
        self.backend = backend
        self.first_token = first_token.clone()
        self.position = position
        self.room = room
        self.token = first_token.clone()

    def prepare(self) -> dict[str, Any]:
        """Capture or compile, before anything is timed.

        Returns:
            What the record says of it.
        """
        return {}

    @abstractmethod
    def step(self) -> None:
        """Launch one step; returns before the device has done it."""

    def feed(self, token: Tensor) -> None:
        """Make `token`, int64 `[batch]`, the next step's."""
        self.token = token.clone()

    def rewind(self) -> None:
        """Back to where the prefill ended."""
        self.backend.seek(self.position)
        self.feed(self.first_token)

    def evidence(self) -> dict[str, Any]:
        """What the record says after the timed passes."""
        return {}


class Eager(Execution):
    """Every kernel launched from Python."""

    name = "eager"

    def step(self) -> None:
        """See `Execution.step`."""
        self.token = self.backend.decode_step(self.token).argmax(dim=-1)


class CudaGraph(Execution):
    """The whole step captured once, argmax and feeding back included, and replayed.

    The graph reads and writes one token buffer, and the backend keeps its position on the device, so a
    replay needs nothing from the host. Before it is timed some replays are proven to be eager steps
    (`registry.proof`).
    """

    name = "cuda_graph"
    replays = 0
    logits: Tensor

    def prepare(self) -> dict[str, Any]:
        """See `Execution.prepare`.

        Raises:
            Refused: `incorrect` if the replayed tokens are not eager's, `unsupported` if the step cannot be
                captured.
        """
        import torch

        expected = eager_logits(self)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARMUPS):
                self.rewind()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.rewind()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self._step()
        except RuntimeError as error:
            raise Refused(
                Outcome.UNSUPPORTED,
                f"the step cannot be captured: {str(error).splitlines()[0]}",
                "Use execution=eager",
            ) from error
        proof = prove(self, self._replay, expected, "the replayed graph", ": it has to live on the device")
        self.replays = 0
        return proof

    def _step(self) -> None:
        self.logits = self.backend.decode_step(self.token)
        self.token.copy_(self.logits.argmax(dim=-1))

    def _replay(self) -> Tensor:
        self.step()
        return self.logits

    def step(self) -> None:
        """See `Execution.step`."""
        self.graph.replay()
        self.replays += 1

    def feed(self, token: Tensor) -> None:
        """See `Execution.feed`; the token's buffer stays where the graph expects it."""
        self.token.copy_(token)

    def evidence(self) -> dict[str, Any]:
        """See `Execution.evidence`."""
        return {"replays": self.replays}


EXECUTIONS: dict[str, type[Execution]] = {kind.name: kind for kind in (Eager, CudaGraph)}

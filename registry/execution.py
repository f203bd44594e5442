"""How a step is launched, for every backend alike.

A step is the model's forward for one token, greedy argmax on the device, and feeding that token back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome, Refused

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import Backend

PROOF_STEPS = 8
"""Steps whose tokens a graph must share with the eager step before it is timed."""
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

    def rewind(self) -> None:
        """Back to where the prefill ended."""
        self.backend.seek(self.position)
        self.token = self.first_token.clone()

    def evidence(self) -> dict[str, Any]:
        """What the record says after the timed passes."""
        return {}


class Eager(Execution):
    """Every kernel launched from Python."""

    def step(self) -> None:
        """See `Execution.step`."""
        self.token = self.backend.decode_step(self.token).argmax(dim=-1)


class CudaGraph(Execution):
    """The whole step captured once, argmax and feeding back included, and replayed.

    The graph reads and writes one token buffer, and the backend keeps its position on the device, so a
    replay needs nothing from the host. Before it is timed its tokens are compared with eager's.
    """

    replays = 0

    def prepare(self) -> dict[str, Any]:
        """See `Execution.prepare`.

        Raises:
            Refused: `incorrect` if the replayed tokens are not eager's, `unsupported` if the step cannot be
                captured.
        """
        import torch

        steps = min(PROOF_STEPS, self.room)
        expected, margins = self._eager_tokens(steps)
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
        self.rewind()
        agreed = self._compare(expected, margins)
        self.rewind()
        self.replays = 0
        return {"proof_steps": steps, "proof_agreed": agreed}

    def _step(self) -> None:
        self.token.copy_(self.backend.decode_step(self.token).argmax(dim=-1))

    def _eager_tokens(self, steps: int) -> tuple[list[Tensor], list[Tensor]]:
        """Eager's tokens, and by how much each one's logit beats the next, in units of bf16 noise."""
        tokens, margins = [], []
        self.rewind()
        token = self.token
        for _ in range(steps):
            logits = self.backend.decode_step(token).float()
            top = logits.topk(2, dim=-1)
            token = top.indices[:, 0]
            tokens.append(token)
            margins.append(top.values[:, 0] - top.values[:, 1] - noise(logits))
        self.rewind()
        return tokens, margins

    def _compare(self, expected: list[Tensor], margins: list[Tensor]) -> int:
        """Replay, and count the steps that agree; the first one within noise ends the comparison."""
        for index, (token, margin) in enumerate(zip(expected, margins, strict=True)):
            self.step()
            differs = self.token != token
            if bool((differs & (margin > 0)).any()):
                raise Refused(
                    Outcome.INCORRECT,
                    f"the replayed graph chose another token than the eager step, {index + 1} in",
                )
            if bool(differs.any()):
                return index
        return len(expected)

    def step(self) -> None:
        """See `Execution.step`."""
        self.graph.replay()
        self.replays += 1

    def rewind(self) -> None:
        """See `Execution.rewind`; the token's buffer stays where the graph expects it."""
        self.backend.seek(self.position)
        self.token.copy_(self.first_token)

    def evidence(self) -> dict[str, Any]:
        """See `Execution.evidence`."""
        return {"replays": self.replays}


EXECUTIONS: dict[str, type[Execution]] = {"eager": Eager, "cuda_graph": CudaGraph}


def noise(logits: Tensor) -> Tensor:
    """By how much two bf16 logits of one step may differ and mean nothing, `[batch]`.

    bf16 keeps 8 significant bits, so one rounding of the largest logit is 2^-8 of it; four of them leave
    room for sums taken in another order.

    Args:
        logits: float32 `[batch, vocab]`.
    """
    return logits.abs().amax(dim=-1) * 2**-8 * 4

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

PROOF_STEPS = 16
"""Steps that a graph must share with the eager step before it is timed."""
MIN_CORRELATION = 0.999
"""Of a replay's logits with the eager step's on the same token and cache.

On one H200 (2026-11-22, random weights, docs/results/2026-11-22-h200) the replays of 26 runs kept 0.9997 at least; a
step at the position where the capture was made fell to 0.9989 (qwen2.5-7b, context 2048) and to 0.978 (llama-3.1-8b,
16384).
"""
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
    replay needs nothing from the host. Before it is timed each of some replays is given the token that the
    eager step was given, and has to come to its logits and, where those are decided, to its choice; and the
    position has to have moved by their number.
    """

    replays = 0
    logits: Tensor

    def prepare(self) -> dict[str, Any]:
        """See `Execution.prepare`.

        Raises:
            Refused: `incorrect` if the replayed tokens are not eager's, `unsupported` if the step cannot be
                captured.
        """
        import torch

        steps = min(PROOF_STEPS, self.room)
        expected = self._eager_logits(steps)
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
        proof = self._compare(expected)
        self.rewind()
        self.replays = 0
        return proof

    def _step(self) -> None:
        self.logits = self.backend.decode_step(self.token)
        self.token.copy_(self.logits.argmax(dim=-1))

    def _eager_logits(self, steps: int) -> list[Tensor]:
        """The logits of eager steps, each fed with the choice of the one before, float32 `[batch, vocab]`."""
        self.rewind()
        token, found = self.token, []
        for _ in range(steps):
            found.append(self.backend.decode_step(token).float())
            token = found[-1].argmax(dim=-1)
        self.rewind()
        return found

    def _compare(self, expected: list[Tensor]) -> dict[str, Any]:
        """Replay on the tokens that eager was given, and hold each step's outcome against eager's."""
        agreed, least = 0, 1.0
        for index, eager in enumerate(expected):
            self.step()
            correlation = float(_correlation(self.logits.float(), eager).min())
            if not correlation >= MIN_CORRELATION:  # a NaN is not at least anything
                raise Refused(
                    Outcome.INCORRECT,
                    f"the replayed graph's logits correlate by {correlation:.5f} with the eager step's on the same "
                    f"token, {index + 1} in; {MIN_CORRELATION} is the least",
                )
            choice = eager.argmax(dim=-1)
            differs = self.token != choice
            top = eager.topk(2, dim=-1).values
            if bool((differs & (top[:, 0] - top[:, 1] > noise(eager))).any()):
                raise Refused(
                    Outcome.INCORRECT,
                    f"the replayed graph chose another token than the eager step, {index + 1} in",
                )
            agreed += not bool(differs.any())
            least = min(least, correlation)
            self.token.copy_(choice)  # what eager's next step was given
        moved = self.backend.position() - self.position
        if moved != len(expected):
            raise Refused(
                Outcome.INCORRECT,
                f"{len(expected)} replays of the graph moved the position by {moved}: it has to live on the device",
            )
        return {"proof_steps": len(expected), "proof_agreed": agreed, "proof_correlation": least}

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


def _correlation(one: Tensor, two: Tensor) -> Tensor:
    """Pearson's, `[batch]`: what all logits of a step share, a bias of the head, proves nothing."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(one - one.mean(-1, keepdim=True), two - two.mean(-1, keepdim=True), dim=-1)


def noise(logits: Tensor) -> Tensor:
    """By how much two bf16 logits of one step may differ and mean nothing, `[batch]`.

    bf16 keeps 8 significant bits, so one rounding of the largest logit is 2^-8 of it; four of them leave
    room for sums taken in another order.

    Args:
        logits: float32 `[batch, vocab]`.
    """
    return logits.abs().amax(dim=-1) * 2**-8 * 4

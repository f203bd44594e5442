"""How a step is launched, for every backend alike.

A step is the model's forward for one token, greedy argmax on the device, and feeding that token back.
"""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from registry.capture import capture
from registry.compiling import Compilations, refusal
from registry.outcome import unsupported
from registry.proof import eager_logits, prove
from registry.schema import COMPILE_MODES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from registry.api import Backend

SETTLED = 2
"""Steps in a row in which torch.compile did nothing, after which it is taken to be done."""
MOST_COMPILING = 24
"""Steps that it gets for that: Dynamo gives a function up after its eighth compilation."""
REASONS_TOLD = 3


class Execution(ABC):
    """Steps a backend from a position on.

    Args:
        backend: Loaded and prefilled.
        first_token: int64 `[batch]`, what the prefill chose.
        position: Tokens in the cache after the prefill; every `rewind` comes back to it.
        room: Steps that the cache has room for.
        mode: torch.compile's, for `compile`.
    """

    name: ClassVar[str]

    def __init__(
        self, backend: Backend, first_token: Tensor, position: int, room: int, mode: str | None = None
    ) -> None:
        self.backend = backend
        self.first_token = first_token.clone()
        self.position = position
        self.room = room
        self.mode = mode
        self.token = first_token.clone()

    def preparing(self) -> str:
        """What `prepare` does, as a stage."""
        return f"prepare {self.name}"

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

    def close(self) -> None:  # noqa: B027 - eager holds nothing
        """Let go of what was captured or compiled, and so of the backend's tensors."""


class Eager(Execution):
    """Every kernel launched from Python."""

    name = "eager"

    def step(self) -> None:
        """See `Execution.step`."""
        self.token = self.backend.decode_step(self.token).argmax(dim=-1)


class CudaGraph(Execution):
    """The whole step captured once, argmax and feeding back included, and replayed.

    The graph reads and writes one token buffer, and the backend keeps its position on the device, so a
    replay needs nothing from the host. Before it is timed some replays are proven to be eager steps, their
    choices, which may be a kernel of the backend's, with them (`registry.proof`).
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
        expected = eager_logits(self)
        self.graph = capture("the step", self._warm_up, self._step)
        proof = prove(self, self._replay, expected, "the replayed graph", ": it has to live on the device")
        self.replays = 0
        return proof

    def _warm_up(self) -> None:
        self._step()
        self.rewind()

    def _step(self) -> None:
        self.logits = self.backend.decode_step(self.token)
        self.backend.choose(self.logits, self.token)

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


class Compiled(Execution):
    """The step compiled by torch.compile, argmax included, and called from Python.

    A mode that records CUDA graphs writes each step's outputs over those of the one before, and has to be told
    where a step begins: the token is fed back as a clone, and the logits are let go. Before it is timed some
    compiled steps are proven to be eager steps (`registry.proof`).
    """

    name = "compile"

    def preparing(self) -> str:
        """See `Execution.preparing`."""
        return f"build compiled step ({self.mode}, kept; minutes the first time)"

    def prepare(self) -> dict[str, Any]:
        """See `Execution.prepare`: as many steps as compiling and recording take, their seconds told apart.

        Raises:
            Refused: `incorrect` if the compiled steps are not eager's, `unsupported` if the step cannot be compiled,
                `missing_dependency` if there is no compiler.
        """
        import torch
        from torch._inductor.async_compile import shutdown_compile_workers

        expected = eager_logits(self)
        self._compile()
        start = time.perf_counter()
        try:
            self._settle()
            if self.backend.setup.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exception(error)
            raise refusal(error) from error
        compile_s = time.perf_counter() - start
        done = Compilations.now().since(self._begun)
        if not done.graphs:
            raise unsupported(
                "torch.compile compiled nothing of the step",
                "Unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or use execution=eager",
            )
        proof = prove(self, self.launch, expected, "the compiled step")
        shutdown_compile_workers()  # they would live, and a thread with them, while steps are timed
        self._ready = Compilations.now()
        return {"compile_s": round(compile_s, 3), "graphs_from_cache": done.from_cache, **proof}

    def _compile(self) -> None:
        import torch

        backend = self.backend

        def step(token: Tensor) -> tuple[Tensor, Tensor]:
            logits = backend.decode_step(token)
            return logits.argmax(dim=-1), logits

        torch.compiler.reset()  # Dynamo would count the compilations of an earlier step against this one's limit
        self._begun = Compilations.now()
        self._call: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(step, mode=self.mode)
        mark: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
        self._mark = mark if COMPILE_MODES[self.mode or ""] else None

    def _settle(self) -> None:
        """Step until nothing is compiled or recorded any more."""
        idle = 0
        for number in range(MOST_COMPILING):
            if number % self.room == 0:
                self.rewind()
            before = Compilations.now()
            self.launch()
            idle = idle + 1 if Compilations.now() == before else 0
            if idle == SETTLED:
                return

    def launch(self) -> Tensor:
        """One step; its logits, `[batch, vocab]`, which the next one may overwrite."""
        if self._mark:
            self._mark()
        token, logits = self._call(self.token)
        self.token = token.clone()
        return logits

    def step(self) -> None:
        """See `Execution.step`."""
        self.launch()

    def evidence(self) -> dict[str, Any]:
        """See `Execution.evidence`: all that torch.compile did, and what it did while steps were timed."""
        now = Compilations.now()
        whole, window = now.since(self._begun), now.since(self._ready)
        return {
            "mode": self.mode,
            "compiled_graphs": whole.graphs,
            "graph_breaks": whole.breaks.total(),
            "graph_break_reasons": [reason for reason, _ in whole.breaks.most_common(REASONS_TOLD)],
            "recompilations": window.frames,
            "cudagraph_skips": whole.skips,
            "rerecorded": window.recorded > 0,
        }

    def close(self) -> None:
        """See `Execution.close`: Dynamo and recorded graphs hold what they were compiled for."""
        import torch

        self.__dict__.pop("_call", None)
        torch.compiler.reset()


EXECUTIONS: dict[str, type[Execution]] = {kind.name: kind for kind in (Eager, CudaGraph, Compiled)}

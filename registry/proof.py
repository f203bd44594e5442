"""Proof that a captured or compiled step is the eager step, before it is timed.

Each of some steps is given the token that the eager step was given, and has to come to its logits and, where those
are decided, to its choice; and the position has to have moved by their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from registry.execution import Execution

PROOF_STEPS = 16
"""Steps that a graph or a compiled step must share with the eager step before it is timed."""
MIN_CORRELATION = 0.999
"""Of a step's logits with the eager step's on the same token and cache.

On one H200 (2026-11-22, random weights, docs/results/2026-11-22-h200) the replays of 26 runs kept 0.9997 at least; a
step at the position where the capture was made fell to 0.9989 (qwen2.5-7b, context 2048) and to 0.978 (llama-3.1-8b,
16384).
"""


def eager_logits(execution: Execution) -> list[Tensor]:
    """The logits of eager steps, each fed with the choice of the one before, float32 `[batch, vocab]`.

    They lie on the host: what decoding holds of the device's memory is looked at meanwhile.
    """
    execution.rewind()
    token, found = execution.token, []
    for _ in range(min(PROOF_STEPS, execution.room)):
        logits = execution.backend.decode_step(token).float()
        token = logits.argmax(dim=-1)
        found.append(logits.cpu())
    execution.rewind()
    return found


def prove(
    execution: Execution, launch: Callable[[], Tensor], expected: list[Tensor], who: str, cause: str = ""
) -> dict[str, Any]:
    """Hold steps on the tokens that eager was given against what eager made of them. Rewinds before and after.

    Args:
        execution: Launches the steps.
        launch: One step of it; returns the step's logits, `[batch, vocab]`.
        expected: What `eager_logits` gave.
        who: What takes the steps, for messages.
        cause: Why the position may not have moved with them, for a message.

    Returns:
        What the record says of it.

    Raises:
        Refused: `incorrect`: logits, choices or positions are not eager's.
    """
    execution.rewind()
    agreed, least = 0, 1.0
    for index, eager in enumerate(expected):
        correlation = float(_correlation(launch().float().cpu(), eager).min())
        if not correlation >= MIN_CORRELATION:  # a NaN is not at least anything
            raise Refused(
                Outcome.INCORRECT,
                f"{who}'s logits correlate by {correlation:.5f} with the eager step's on the same "
                f"token, {index + 1} in; {MIN_CORRELATION} is the least",
            )
        choice = eager.to(execution.token.device).argmax(dim=-1)  # of equal logits the one that eager's step took
        differs = (execution.token != choice).cpu()
        top = eager.topk(2, dim=-1).values
        if bool((differs & (top[:, 0] - top[:, 1] > noise(eager))).any()):
            raise Refused(Outcome.INCORRECT, f"{who} chose another token than the eager step, {index + 1} in")
        agreed += not bool(differs.any())
        least = min(least, correlation)
        execution.feed(choice)  # what eager's next step was given
    moved = execution.backend.position() - execution.position
    if moved != len(expected):
        raise Refused(Outcome.INCORRECT, f"{len(expected)} steps of {who} moved the position by {moved}{cause}")
    execution.rewind()
    return {"proof_steps": len(expected), "proof_agreed": agreed, "proof_correlation": least}


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

"""Do the plugins compute the model at all: a two-layer cut against plain transformers.

A fast step that answers wrongly is worth nothing, so before anything is timed the cell's own plugins
decode a few tokens on a two-layer cut of its architecture, and a plain bf16 transformers model with the
dequantised weights reads the same tokens in one forward.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from registry.outcome import Outcome, Refused

if TYPE_CHECKING:
    from torch import Tensor

    from registry.api import Architecture, Backend

LAYERS = 2
PREFIX = 33
STEPS = 8
MIN_COSINE = 0.999
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Fidelity:
    """How close the decoded logits are to the reference's.

    Attributes:
        logit_cosine: The least cosine similarity over streams and positions.
        top1_agreement: Fraction of streams and positions with the same most likely token.
        positions: Positions compared, the prefill's last one included.
    """

    logit_cosine: float
    top1_agreement: float
    positions: int

    def require(self) -> dict[str, Any]:
        """The plain form.

        Raises:
            Refused: `incorrect` below a cosine of 0.999.
        """
        if not self.logit_cosine >= MIN_COSINE:  # a NaN is not at least anything
            raise Refused(
                Outcome.INCORRECT,
                f"on a {LAYERS}-layer cut the logits reach a cosine of {self.logit_cosine:.5f} with plain "
                f"transformers on the same weights, {MIN_COSINE} is the least",
            )
        return asdict(self)


def compare(backend: Backend, seed: int) -> Fidelity:
    """Decode with `backend`, read the same tokens with plain transformers, compare the logits.

    Args:
        backend: Made for the cut, not loaded; closed afterwards.
        seed: Chooses the prompt.
    """
    import torch

    setup = backend.setup
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(setup.architecture.vocab, (setup.batch_size, PREFIX), generator=generator)
    try:
        backend.load(PREFIX + STEPS)
        tokens = prompt.to(setup.device)
        reference = _reference(setup.architecture, dict(backend.dequantized()), setup.dtype, setup.device)
        logits = [backend.prefill(tokens)]
        for _ in range(STEPS):
            token = logits[-1].argmax(dim=-1)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            logits.append(backend.decode_step(token))
        decoded = torch.stack(logits, dim=1).float()
        expected = reference(input_ids=tokens, logits_to_keep=STEPS + 1).logits.float()
        del reference
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong is told, not what closing makes of it
            backend.close()
        raise
    backend.close()
    gc.collect()
    return Fidelity(
        logit_cosine=float(torch.nn.functional.cosine_similarity(decoded, expected, dim=-1).min()),
        top1_agreement=float((decoded.argmax(-1) == expected.argmax(-1)).float().mean()),
        positions=decoded.shape[1],
    )


def _reference(architecture: Architecture, weights: dict[str, Tensor], dtype: Any, device: str) -> Any:
    """A transformers model as `from_config` makes it, its parameters replaced by `weights`."""
    import torch
    from transformers import AutoModelForCausalLM

    # Some runtimes store a head of its own where the model ties it to the embedding.
    architecture = replace(architecture, tied_embeddings=architecture.tied_embeddings and HEAD not in weights)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as an argument it has two names, by transformers' version
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(architecture.transformers_config(), attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(default)
    model.eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {HEAD} if architecture.tied_embeddings else set()
    if set(missing) - tied or unexpected:
        raise Refused(
            Outcome.INCORRECT,
            f"the backend's dequantised weights are not the model's: missing {sorted(set(missing) - tied)[:3]}, "
            f"unknown {list(unexpected)[:3]}",
        )
    return model

"""Bytes and floors: pure arithmetic, decimal gigabytes and milliseconds, no torch.

Three conventions live side by side, because the study itself uses more than one and a ratio
without its convention means nothing:

* the study's tables: every parameter, embedding and LM head included, at `study_bits` each, plus the
  KV cache at the *mean* context over the measured steps, over the spec sheet's bandwidth (`study_bytes`);
* model bandwidth utilisation (MBU): what a step really streams as it is stored, so scales and zeros in
  and an input embedding of which one row is read out, over the same bandwidth (`utilisation`);
* the study's anatomy figure: the decoder blocks and the KV cache alone (`anatomy_bytes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.architecture import Architecture

GB = 1e9
"""Decimal, as bandwidth is sold."""


def mean_context(context: int, warmup_steps: int, measured_steps: int) -> float:
    """Mean number of cached tokens that a measured step attends to.

    The prefill leaves `context` tokens, warm-up step *i* attends to `context + i`, and the token that a
    step appends is attended to by that very step. At context 2048 with 5 + 30 steps this is 2068.5,
    which gives the study's 51.17 ms on an L4 and 118.6 MB of KV, where the study writes 118.

    Args:
        context: Tokens in the cache after the prefill.
        warmup_steps: Steps before the first measured one.
        measured_steps: Steps that are timed.

    Returns:
        Tokens.
    """
    return context + warmup_steps + (measured_steps + 1) / 2


def study_weight_bytes(architecture: Architecture, study_bits: float) -> float:
    """Weight bytes as the study counts them: all parameters at `study_bits` (16, or 4 for any int4 runtime)."""
    return architecture.parameters * study_bits / 8


def kv_bytes(architecture: Architecture, context: float, batch_size: int = 1, element_bytes: int = 2) -> float:
    """Bytes of keys and values that one step reads: 2 x layers x kv heads x head_dim x context x element.

    Args:
        architecture: The model.
        context: Cached tokens attended to, the new one included.
        batch_size: Streams, each with its own cache.
        element_bytes: Bytes of one cached number (2 for bf16).
    """
    return architecture.kv_bytes_per_token(element_bytes) * context * batch_size


def study_bytes(architecture: Architecture, study_bits: float, context: float, batch_size: int = 1) -> float:
    """W + K of the study's floor, in bytes."""
    return study_weight_bytes(architecture, study_bits) + kv_bytes(architecture, context, batch_size)


def anatomy_bytes(architecture: Architecture, context: float) -> float:
    """The study's anatomy figure: bf16 blocks and KV, without embedding, LM head and final norm."""
    return architecture.layers * architecture.block_parameters * 2 + kv_bytes(architecture, context)


def floor_ms(bytes_per_step: float, bandwidth_gbs: float) -> float:
    """Milliseconds that `bytes_per_step` take at `bandwidth_gbs` GB/s (decimal)."""
    return bytes_per_step / (bandwidth_gbs * GB) * 1e3


def utilisation(bytes_per_step: float, bandwidth_gbs: float, step_ms: float) -> float:
    """Floor over time: the fraction of `bandwidth_gbs` that a step of `step_ms` realised.

    The same quotient is the study's `r_floor` (its bytes, spec bandwidth), the field's `mbu` (streamed
    bytes, spec bandwidth) and `mbu_attainable` (streamed bytes, measured read bandwidth). It may exceed 1,
    when a cache holds part of what is counted or the spec is wrong; it is never clipped.
    """
    return floor_ms(bytes_per_step, bandwidth_gbs) / step_ms


def usd_per_mtok(step_ms: float, price_usd_per_hour: float, batch_size: int = 1) -> float:
    """Dollars for a million tokens at one step's pace, the device otherwise idle.

    The study's: $3.50/h at 11.78 ms is $11.45.
    """
    return step_ms / 1e3 * 1e6 / batch_size / 3600 * price_usd_per_hour


def stored_weight_bytes(
    architecture: Architecture, weight_bits: float, element_bytes: int = 2, *, head: bool = False
) -> float:
    """Weights as a runtime stores them: block matrices at `weight_bits`, everything else unquantised.

    An estimate for planning; what a step really streams is counted over the tensors that a backend holds.

    Args:
        architecture: The model.
        weight_bits: Of a weight, its share of scales and zeros included.
        element_bytes: Of an unquantised number.
        head: Whether the LM head is stored as the block matrices are; a tied one then beside the embedding.
    """
    a = architecture
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    matrices = a.layers * (a.hidden * (2 * q + 2 * kv) + 3 * a.hidden * a.ffn)
    stored = matrices * weight_bits / 8 + (a.parameters - matrices) * element_bytes
    if head:
        stored += a.vocab * a.hidden * (weight_bits / 8 - (0 if a.tied_embeddings else element_bytes))
    return stored

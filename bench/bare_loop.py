"""A hand-written decode loop of plain transformers: what the harness's eager figure is held against.

    python bench/bare_loop.py [--model qwen2.5-7b] [--context 2048] [--cache dynamic] [--sdpa flash] [--passes 2]

Imports nothing of rfloor. Prints one JSON line: the median of 30 steps after 5, wall clock with a synchronise
around each step. Each further pass prefills again and walks the same lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

MODELS = {
    "qwen2.5-7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
                   "tie_word_embeddings": False},
    "qwen2.5-0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
                     "tie_word_embeddings": True},
}  # fmt: skip
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
WARMUP, MEASURED = 5, 30


def make_model(config: Any, device: str) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def pinned(kernel: str) -> AbstractContextManager[Any]:
    """Inside, PyTorch attends by one kernel alone, or by its own choice (`default`)."""
    return nullcontext() if kernel == "default" else sdpa_kernel(SDPA[kernel])


def decode(model: Any, context: int, cache_kind: str, device: str, sdpa: str = "default") -> list[float]:
    """Prefill, then milliseconds of each measured step."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    length = context + WARMUP + MEASURED
    cache = DynamicCache(config=model.config) if cache_kind == "dynamic" else StaticCache(model.config, length)
    prompt = torch.randint(model.config.vocab_size, (1, context), device=device)
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    times = []
    with pinned(sdpa):
        for _ in range(WARMUP + MEASURED):
            synchronise()
            start = time.perf_counter_ns()
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            synchronise()
            times.append((time.perf_counter_ns() - start) / 1e6)
    return times[WARMUP:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--sdpa", choices=("default", *SDPA), default="default")
    parser.add_argument("--passes", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.for_model(
        "qwen2",
        **MODELS[args.model],
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
    )
    with torch.inference_mode():
        model = make_model(config, device)
        passes = [decode(model, args.context, args.cache, device, args.sdpa) for _ in range(args.passes)]
    medians = [statistics.median(times) for times in passes]
    print(json.dumps({"median_ms": medians[0], "medians_ms": medians, "times_ms": passes[0]}))


if __name__ == "__main__":
    main()

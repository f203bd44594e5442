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
from contextlib import nullcontext

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
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    prompt = torch.randint(config.vocab_size, (1, args.context), device=device)
    with torch.inference_mode():
        passes = []
        for _ in range(args.passes):
            length = args.context + WARMUP + MEASURED
            cache = DynamicCache(config=config) if args.cache == "dynamic" else StaticCache(config, length)
            token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            with nullcontext() if args.sdpa == "default" else sdpa_kernel(SDPA[args.sdpa]):
                passes.append(steps(model, cache, token, torch.cuda.synchronize if device == "cuda" else int))
    medians = [statistics.median(times) for times in passes]
    print(json.dumps({"median_ms": medians[0], "medians_ms": medians, "times_ms": passes[0]}))


def steps(model, cache, token, synchronise) -> list[float]:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(WARMUP + MEASURED):
        synchronise()
        start = time.perf_counter_ns()
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        synchronise()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times[WARMUP:]


if __name__ == "__main__":
    main()

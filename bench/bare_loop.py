"""A hand-written decode loop of plain transformers: what the harness's eager figure is held against.

    python bench/bare_loop.py [--model qwen2.5-7b] [--context 2048]

Imports nothing of rfloor. Prints one JSON line with the median of 30 steps after 5, wall clock with a
synchronise around each step, on a DynamicCache with sdpa.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

MODELS = {
    "qwen2.5-7b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
                   "tie_word_embeddings": False},
    "qwen2.5-0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
                     "tie_word_embeddings": True},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--context", type=int, default=2048)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
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
        cache = DynamicCache(config=config)
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        times = []
        for _ in range(35):
            synchronise()
            start = time.perf_counter_ns()
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            synchronise()
            times.append((time.perf_counter_ns() - start) / 1e6)
    print(json.dumps({"median_ms": statistics.median(times[5:]), "times_ms": times[5:]}))


if __name__ == "__main__":
    main()

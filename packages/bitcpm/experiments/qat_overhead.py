"""What QAT adds to a training step: BitCPM-CANN reports 4.5 % on NPUs.

    python experiments/qat_overhead.py [--bf16] [--threads 1] [--rounds 20]

Needs transformers. Plain and ternary steps of the same model alternate in one process; the last
line of the output has the median of their paired ratios, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitcpm import ternarize, unternarize


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 512, (8, 256))

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return time.perf_counter() - start

    step()
    plain, ternary = [], []
    for _ in range(args.rounds):
        plain.append(step())
        ternarize(model)
        ternary.append(step())
        unternarize(model)
    ratios = [t / p for p, t in zip(plain, ternary, strict=True)]
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens.numel(),
        "threads": args.threads,
        "bf16": args.bf16,
        "plain_ms": round(statistics.median(plain) * 1e3, 1),
        "ternary_ms": round(statistics.median(ternary) * 1e3, 1),
        "median_ratio": round(statistics.median(ratios), 3),
        "ratio_of_minima": round(min(ternary) / min(plain), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

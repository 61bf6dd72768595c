"""Tiny random models; other processes of the tests build them too."""

from __future__ import annotations

import torch

SIZES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)


def build(arch: str, seed: int = 0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = SIZES | (dict(num_key_value_heads=6) if arch == "llama" else {}) | changes
    if arch == "qwen3":
        sizes.setdefault("head_dim", 8)
    config = AutoConfig.for_model(arch.partition("-")[0], **sizes)
    return AutoModelForCausalLM.from_config(config).eval()

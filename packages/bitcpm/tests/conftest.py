from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The kernels' checks lie beside this file; other processes run them too.
sys.path.insert(0, str(Path(__file__).parent))

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
ARCHITECTURES = ("llama", "llama-gqa3", "qwen3", "phi3", "mistral")


def build(arch: str, seed: int = 0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = SIZES | (dict(num_key_value_heads=6) if arch == "llama" else {}) | changes
    if arch == "qwen3":
        sizes.setdefault("head_dim", 8)
    config = AutoConfig.for_model(arch.partition("-")[0], **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def tiny() -> Callable:
    return build


@pytest.fixture
def ternary_folder(tmp_path):
    """A pseudo-quantised llama in bf16, groups of 32: rows of 48 and 80 have tails."""
    from bitcpm import TernaryConfig, materialise, ternarize

    model = materialise(ternarize(build("llama-gqa3"), TernaryConfig(group_size=32)))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"fake": true}')
    return tmp_path / "model"

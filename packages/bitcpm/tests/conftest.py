from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# What other processes run too lies beside this file.
sys.path.insert(0, str(Path(__file__).parent))

from bitcpm_models import build


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

"""MiniCPM4: the model, its trainer, and the pipeline from raw text to a fast small model."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4")

# Where each public name lives. Imported on first use, so that `import minicpm4` stays quick.
_HOME = {
    "MiniCPM4Config": "configuration",
    "MiniCPM4ForCausalLM": "modeling",
    "MiniCPM4Model": "modeling",
    "TrainConfig": "trainer",
    "WSD": "schedule",
    "load": "presets",
    "preset": "presets",
    "register": "presets",
    "train": "trainer",
    "train_bpe": "tokenizer",
}

__all__ = [
    "WSD",
    "MiniCPM4Config",
    "MiniCPM4ForCausalLM",
    "MiniCPM4Model",
    "TrainConfig",
    "load",
    "preset",
    "register",
    "train",
    "train_bpe",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""CPM.cu's place in the house: an inference engine for end-side devices.

Reads Llama, Mistral, Qwen2, Qwen3 and MiniCPM models from safetensors folders, GGUF files and
bitcpm's packed ternary folders, without transformers. `Engine.from_pretrained` is the way in.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Engine": "engine",
    "Generation": "results",
    "ModelSpec": "spec",
    "Plan": "plan",
    "Sampling": "sampling",
    "Score": "results",
    "Session": "session",
    "SparseAttention": "sparse",
    "Stats": "results",
    "Stream": "results",
    "Tokenizer": "tokenizer",
}
__all__ = [
    "Engine",
    "Generation",
    "ModelSpec",
    "Plan",
    "Sampling",
    "Score",
    "Session",
    "SparseAttention",
    "Stats",
    "Stream",
    "Tokenizer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # slow

        return metadata.version("minicpm4-cpmcu")
    if name in _HOME:
        return getattr(import_module(f"cpmcu.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cpmcu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

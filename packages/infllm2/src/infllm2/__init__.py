"""InfLLM v2: trainable block-sparse attention, exact over the blocks it visits (arXiv 2509.24663).

The names below need only PyTorch and are imported on first use; what needs transformers or
matplotlib lives in `infllm2.hf` and `infllm2.visualise`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infllm2.attention import block_sparse_attention, infllmv2_attention
    from infllm2.cache import SparseCache
    from infllm2.config import InfLLMv2Config
    from infllm2.hf import register, sparse, traced_dense
    from infllm2.layer_cache import LayerCache
    from infllm2.selection import select_blocks

__version__ = importlib.metadata.version("minicpm4-infllm2")

_HOME = {
    "InfLLMv2Config": "infllm2.config",
    "LayerCache": "infllm2.layer_cache",
    "SparseCache": "infllm2.cache",
    "select_blocks": "infllm2.selection",
    "block_sparse_attention": "infllm2.attention",
    "infllmv2_attention": "infllm2.attention",
    "register": "infllm2.hf",
    "sparse": "infllm2.hf",
    "traced_dense": "infllm2.hf",
}

__all__ = [
    "InfLLMv2Config",
    "LayerCache",
    "SparseCache",
    "block_sparse_attention",
    "infllmv2_attention",
    "register",
    "select_blocks",
    "sparse",
    "traced_dense",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'infllm2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

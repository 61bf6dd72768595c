"""APB: prefill one long context on many hosts that pass each other their best keys.

APB (arXiv 2502.12085, ACL 2025) beside exact and approximate relatives, on virtual hosts or on
torch.distributed. The names below are imported on first use; `prefill` needs transformers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-apb")

_HOME = {
    "APBConfig": "config",
    "Compressor": "compressors",
    "Context": "context",
    "DistributedGroup": "distributed",
    "Group": "transport",
    "Host": "transport",
    "KeyDifference": "compressors",
    "KeyNorm": "compressors",
    "Lengths": "config",
    "LocretHeads": "locret_heads",
    "NoPassing": "compressors",
    "PrefillResult": "reference",
    "QueryAttention": "compressors",
    "Random": "compressors",
    "Strategy": "plan",
    "VirtualGroup": "virtual",
    "apb_prefill": "reference",
    "distributed_decode": "reference",
    "make_compressor": "registry",
    "make_strategy": "registry",
    "merge_lse": "merge",
    "partial_attention": "partial",
    "prefill": "engine",
    "torchrun_group": "distributed",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module 'apb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

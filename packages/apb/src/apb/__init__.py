"""APB: prefill one long context on many hosts that pass each other their best keys.

The reference algorithm of arXiv 2502.12085 (ACL 2025), for one attention layer on virtual hosts
in one process. The names below need only PyTorch and are imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apb.compressors import Compressor, KeyNorm, NoPassing, QueryAttention, Random
    from apb.config import APBConfig, Lengths
    from apb.merge import merge_lse
    from apb.reference import PrefillResult, apb_prefill, distributed_decode

__version__ = importlib.metadata.version("minicpm4-apb")

_HOME = {
    "APBConfig": "apb.config",
    "Compressor": "apb.compressors",
    "KeyNorm": "apb.compressors",
    "Lengths": "apb.config",
    "NoPassing": "apb.compressors",
    "PrefillResult": "apb.reference",
    "QueryAttention": "apb.compressors",
    "Random": "apb.compressors",
    "apb_prefill": "apb.reference",
    "distributed_decode": "apb.reference",
    "merge_lse": "apb.merge",
}

__all__ = [
    "APBConfig",
    "Compressor",
    "KeyNorm",
    "Lengths",
    "NoPassing",
    "PrefillResult",
    "QueryAttention",
    "Random",
    "apb_prefill",
    "distributed_decode",
    "merge_lse",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'apb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

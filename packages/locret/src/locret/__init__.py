"""Locret: small trained heads that decide which keys a bounded cache keeps (arXiv 2410.01805).

The names below are imported on first use; those that run a model need transformers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-locret")

_HOME = {
    "HeadsAndKeyDiff": "heads_and_keydiff",
    "HeadsConfig": "heads",
    "LocretCache": "cache",
    "LocretConfig": "config",
    "Prefill": "reference",
    "RetainingHead": "retaining_head",
    "RetainingHeads": "heads",
    "SCORERS": "scorers",
    "Scorer": "scoring",
    "attention_importance": "reference",
    "chunked_prefill": "reference",
    "evict": "reference",
    "generate": "generation",
    "importance": "reference",
    "locret": "context",
    "prefill": "generation",
    "qkv_input": "retaining_head",
    "query_first": "generation",
    "retaining_loss": "retaining_head",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

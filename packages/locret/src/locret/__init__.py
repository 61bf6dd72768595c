"""Locret: small trained heads that decide which keys a bounded cache keeps."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-locret")

_HOME = {
    "LocretConfig": "config",
    "Prefill": "reference",
    "RetainingHead": "retaining_head",
    "chunked_prefill": "reference",
    "evict": "reference",
    "importance": "reference",
    "retaining_loss": "retaining_head",
}

__all__ = [
    "LocretConfig",
    "Prefill",
    "RetainingHead",
    "chunked_prefill",
    "evict",
    "importance",
    "retaining_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Densing Law: how many parameters a reference model would need to be as good."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-densing")

# Where each public name lives; fitting needs scipy, which is imported when a fit runs.
_HOME = {
    "Density": "law",
    "Fit": "fit",
    "LossLaw": "law",
    "OutOfRange": "law",
    "Reference": "law",
    "ScoreLaw": "law",
    "Trend": "trend",
    "combined_doubling": "trend",
    "density": "law",
    "fit_loss_law": "fit",
    "fit_trend": "trend",
    "halving_time": "trend",
}

__all__ = [
    "Density",
    "Fit",
    "LossLaw",
    "OutOfRange",
    "Reference",
    "ScoreLaw",
    "Trend",
    "combined_doubling",
    "density",
    "fit_loss_law",
    "fit_trend",
    "halving_time",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

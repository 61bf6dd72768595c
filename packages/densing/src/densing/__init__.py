"""Densing Law: how many parameters a reference model would need to be as good."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-densing")

# Where each public name lives; fitting and tables are imported when one of theirs is asked for.
_HOME = {
    "Density": "capacity_density",
    "FamilyReference": "reference",
    "LossLaw": "reference",
    "OutOfRange": "capacity_density",
    "Reference": "reference",
    "ScoreLaw": "reference",
    "density": "capacity_density",
    "effective_parameters": "capacity_density",
    "fit_reference": "reference_models",
    "reference_from_dict": "reference_models",
    "reference_to_dict": "reference_models",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Ultra-FineWeb's quality filter: train a fastText classifier, score text, keep the good part."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-ultraclean")

# Where each public name lives. Imported on first use, so that `import ultraclean` stays quick.
_HOME = {
    "Classifier": "classifier",
    "ClassifierConfig": "config",
    "FilterReport": "filter",
    "Normaliser": "normalise",
    "Scorer": "scorer",
    "auc": "evaluate",
    "bootstrap_auc": "evaluate",
    "calibration": "evaluate",
    "filter_corpus": "filter",
    "precision_recall_f1": "evaluate",
    "threshold_for_budget": "evaluate",
    "train": "classifier",
}

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "FilterReport",
    "Normaliser",
    "Scorer",
    "auc",
    "bootstrap_auc",
    "calibration",
    "filter_corpus",
    "precision_recall_f1",
    "threshold_for_budget",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

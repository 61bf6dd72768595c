"""Ultra-FineWeb's quality filter: train a fastText classifier, score text, keep the good part."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-ultraclean")

# Where each public name lives. Imported on first use, so that `import ultraclean` stays quick.
_HOME = {
    "verify": "verification",
    "make_base": "proxy_model",
    "loop": "seed_loop",
    "Verification": "verification",
    "Recipe": "verification",
    "LoopReport": "seed_loop",
    "deduplicate": "dedup",
    "MinHasher": "minhash",
    "DedupReport": "dedup",
    "Decontaminator": "minhash",
    "NORMALISERS": "normalise",
    "Classifier": "classifier",
    "ClassifierConfig": "config",
    "FilterReport": "report",
    "Normaliser": "normalise",
    "Scorer": "scorer",
    "auc": "evaluate",
    "bootstrap_auc": "evaluate",
    "bootstrap_f1": "evaluate",
    "by_source": "evaluate",
    "calibration": "evaluate",
    "convert": "classifier",
    "filter_corpus": "filter",
    "precision_recall_f1": "evaluate",
    "threshold_for_budget": "evaluate",
    "threshold_for_corpus": "filter",
    "threshold_for_percentile": "evaluate",
    "train": "classifier",
}

__all__ = [
    "NORMALISERS",
    "Classifier",
    "ClassifierConfig",
    "Decontaminator",
    "DedupReport",
    "FilterReport",
    "LoopReport",
    "MinHasher",
    "Normaliser",
    "Recipe",
    "Scorer",
    "Verification",
    "auc",
    "bootstrap_auc",
    "bootstrap_f1",
    "by_source",
    "calibration",
    "convert",
    "deduplicate",
    "filter_corpus",
    "loop",
    "make_base",
    "precision_recall_f1",
    "threshold_for_budget",
    "threshold_for_corpus",
    "threshold_for_percentile",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

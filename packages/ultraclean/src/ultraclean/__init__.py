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
    "Decontaminator": "minhash",
    "DedupReport": "dedup",
    "Endpoint": "generation",
    "FilterReport": "report",
    "LoopReport": "seed_loop",
    "MinHasher": "minhash",
    "NORMALISERS": "normalise",
    "Normaliser": "normalise",
    "Recipe": "verification",
    "Scorer": "scorer",
    "Verification": "verification",
    "auc": "evaluate",
    "bootstrap_auc": "evaluate",
    "bootstrap_f1": "evaluate",
    "by_source": "evaluate",
    "calibration": "evaluate",
    "convert": "classifier",
    "deduplicate": "dedup",
    "filter_corpus": "filter",
    "generate": "generation",
    "loop": "seed_loop",
    "make_base": "base_model",
    "precision_recall_f1": "evaluate",
    "threshold_for_budget": "evaluate",
    "threshold_for_percentile": "evaluate",
    "thresholds_for_corpus": "budget",
    "train": "training",
    "verify": "verification",
    "write_page": "page",
    "zero_config": "processes",
}

__all__ = [
    "NORMALISERS",
    "Classifier",
    "ClassifierConfig",
    "Decontaminator",
    "DedupReport",
    "Endpoint",
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
    "generate",
    "loop",
    "make_base",
    "precision_recall_f1",
    "threshold_for_budget",
    "threshold_for_percentile",
    "thresholds_for_corpus",
    "train",
    "verify",
    "write_page",
    "zero_config",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

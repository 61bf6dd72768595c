"""A small real world to test language-model tools in: a real model, real text, tiny models, RULER.

Everything comes from PyPI wheels and is offline once they are installed: see `testbed.fetch`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

__version__ = version("minicpm4-testbed")

# Loaded on first use: `import testbed` must stay light, and half of these need transformers.
# No module here is named as a function: its import would put the module in the function's place.
_HOME = {
    "DATA_WHEELS": "wheels",
    "CorpusInfo": "texts",
    "Document": "texts",
    "RulerSample": "ruler_tasks",
    "cache_dir": "cache",
    "corpora": "texts",
    "corpus": "texts",
    "fetch": "wheels",
    "quick_dtype": "real_model",
    "ruler": "ruler_tasks",
    "ruler_prompt": "ruler_tasks",
    "ruler_score": "ruler_tasks",
    "smollm2": "real_model",
    "smollm2_gguf": "real_model",
    "smollm2_path": "real_model",
    "tiny": "tiny_models",
    "tiny_archs": "tiny_models",
}

__all__ = [
    "DATA_WHEELS",
    "CorpusInfo",
    "Document",
    "RulerSample",
    "__version__",
    "cache_dir",
    "corpora",
    "corpus",
    "fetch",
    "quick_dtype",
    "ruler",
    "ruler_prompt",
    "ruler_score",
    "smollm2",
    "smollm2_gguf",
    "smollm2_path",
    "tiny",
    "tiny_archs",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value

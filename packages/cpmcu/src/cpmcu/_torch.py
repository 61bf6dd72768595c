"""PyTorch when something needs it, and not before: it takes 200 MB and a second to import.

The CPU backend never does. Modules that both it and others use take `torch` from here.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

MISSING = (
    "this needs PyTorch, which is not installed: pip install 'minicpm4-cpmcu[torch]' (the CPU "
    "backend's generate, score and chat do without it)"
)


def is_installed() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


class _Torch:
    """The module `torch`, imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        try:
            module = importlib.import_module("torch")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "torch":
                raise
            raise ImportError(MISSING) from None
        return getattr(module, name)


torch: Any = _Torch()

"""BitCPM: ternary quantisation-aware training and packed ternary weights."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-bitcpm")

# Where each public name lives. They are imported on first use, so that `import bitcpm` is quick.
_HOME = {
    "CheckpointReport": "inspect",
    "PackReport": "convert",
    "PackedTensor": "packing",
    "PackedTernaryLinear": "packed_linear",
    "TernaryConfig": "config",
    "TernaryLinear": "qat",
    "TernaryMatrix": "matrix",
    "TwoStage": "two_stage",
    "TwoStageConfig": "config",
    "dequantise": "reference",
    "inspect_checkpoint": "inspect",
    "load_packed": "format",
    "load_packed_model": "hf",
    "materialise": "qat",
    "pack_layers": "packed_linear",
    "pack_model": "convert",
    "quantisation_stats": "stats",
    "quantise": "reference",
    "quantise_model": "ptq",
    "ternarize": "qat",
    "unpack_layers": "packed_linear",
    "unpack_model": "convert",
    "unternarize": "qat",
}

__all__ = [
    "CheckpointReport",
    "PackReport",
    "PackedTensor",
    "PackedTernaryLinear",
    "TernaryConfig",
    "TernaryLinear",
    "TernaryMatrix",
    "TwoStage",
    "TwoStageConfig",
    "dequantise",
    "inspect_checkpoint",
    "load_packed",
    "load_packed_model",
    "materialise",
    "pack_layers",
    "pack_model",
    "quantisation_stats",
    "quantise",
    "quantise_model",
    "ternarize",
    "unpack_layers",
    "unpack_model",
    "unternarize",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

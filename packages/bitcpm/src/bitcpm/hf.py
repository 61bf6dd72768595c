"""Packed folders as transformers models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .convert import plain_config
from .format import load_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_packed_model(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A packed folder as a plain causal LM in evaluation mode, dequantised in memory.

    It takes the memory of a normal model: kernels that compute on packed weights are not here yet.
    A model type that transformers does not know must be registered first
    (`minicpm4.register()` for MiniCPM4).

    Args:
        path: folder made by `bitcpm pack`.
        dtype: of the model; None takes the one in config.json.

    Raises:
        FileNotFoundError: config.json or the packed file is missing.
        ImportError: transformers is not installed.
        ValueError: the folder is damaged, or does not hold the weights its config.json asks for.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ImportError(
            "load_packed_model needs transformers: pip install 'minicpm4-bitcpm[hf]'"
        ) from None
    folder = Path(path)
    fields = plain_config(folder)
    if not fields:
        raise FileNotFoundError(f"{folder}/config.json is missing: expected a packed model folder")
    state = load_packed(folder, dtype)
    model_type = fields.pop("model_type", None)
    config = AutoConfig.for_model(model_type, **fields)
    # Only the class itself loads from a state dict; on the meta device its skeleton costs nothing.
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype or config.dtype or torch.float32,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} for {model_type}: {names[:3]}")
    return model.eval()

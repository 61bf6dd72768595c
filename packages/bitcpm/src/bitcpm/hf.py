"""Packed folders as transformers models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .convert import plain_config
from .format import PackedFile
from .matrix import Mode, required_kernels
from .packed_linear import PackedTernaryLinear, replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_packed_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    mode: Mode | None = None,
    codec: str | None = None,
) -> PreTrainedModel:
    """A packed folder as a causal LM in evaluation mode.

    Without a mode it is a plain model, dequantised, and takes the memory of one. With a mode its
    ternary layers stay packed and compute in the CPU kernels (`PackedTernaryLinear`). A model type
    that transformers does not know must be registered first (`minicpm4.register()` for MiniCPM4).

    Args:
        path: folder made by `bitcpm pack`.
        dtype: of the model; None takes the one in config.json.
        mode: None, "int8", "int8-group" or "exact".
        codec: of the layers in memory; None keeps the file's.

    Raises:
        FileNotFoundError: config.json or the packed file is missing.
        ImportError: transformers is not installed, or a mode is given and the kernels are not
            built.
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
    if mode is not None:
        required_kernels()
    model_type = fields.pop("model_type", None)
    config = AutoConfig.for_model(model_type, **fields)
    # Only the class itself loads from a state dict; on the meta device its skeleton costs nothing.
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    model_class, dtype = type(skeleton), dtype or config.dtype or torch.float32
    with PackedFile(folder) as file:
        layers = {} if mode is None else _linear_layers(skeleton, file)
        state = {
            # One element that looks like a matrix: its layer is replaced below.
            name: torch.zeros(1, dtype=dtype).expand(file.entries[name].shape)
            if name in layers
            else file.tensor(name, dtype)
            for name in file.names()
        }
        packed = {name: file.packed(name) for name in layers}
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} for {model_type}: {names[:3]}")
    if mode is not None:
        for name, layer in layers.items():
            bias = model.get_submodule(layer).bias
            # Popped: the file's order and the kernels' are never both there for the whole model.
            replace_module(model, layer, PackedTernaryLinear(packed.pop(name), bias, mode, codec))
    return model.eval()


def _linear_layers(model: PreTrainedModel, file: PackedFile) -> dict[str, str]:
    """Packed tensors that are the weight of a linear layer: tensor name to module name."""
    modules = dict(model.named_modules())
    layers = {name: name.removesuffix(".weight") for name in file.entries}
    return {
        name: layer
        for name, layer in layers.items()
        if name.endswith(".weight") and type(modules.get(layer)) is torch.nn.Linear
    }

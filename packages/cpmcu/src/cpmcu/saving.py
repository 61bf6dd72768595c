"""A session on disk: tokens, keys and values in one safetensors file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpmcu._files import atomic_path
from cpmcu.cache import KVCache

if TYPE_CHECKING:
    from cpmcu.session import Loaded

FORMAT = "cpmcu session 1"


def _model(model: Loaded) -> str:
    """What must be equal for keys and values to mean the same, hashed. The weights themselves are
    not compared: who swaps them keeps a cache that no longer fits.
    """
    facts = f"{model.spec!r} {model.dtype} {model.quant}"
    facts = facts.replace(repr(model.spec.source), "")
    return hashlib.sha256(facts.encode()).hexdigest()


def _parts(cache: KVCache, length: int) -> dict[str, Tensor]:
    """Views of what is valid at `length` tokens, by name."""
    parts = {f"layers.{i}": arena[:, :, :length] for i, arena in enumerate(cache.layers)}
    if cache.sparse is not None:
        for name, held, count in zip(
            ("fine", "coarse"), (cache.fine, cache.coarse), cache.sparse.kernels(length),
            strict=True,
        ):  # fmt: skip
            parts |= {f"{name}.{i}": rows[:, :count] for i, rows in enumerate(held)}
    return parts


def save(path: str | Path, model: Loaded, tokens: list[int], cache: KVCache) -> None:
    """Write a sequence, whole or not at all.

    Raises:
        ValueError: it has no tokens.
    """
    from safetensors.torch import save_file

    if not tokens:
        raise ValueError("there is nothing to save: the sequence has no tokens")
    tensors = {name: part.contiguous().cpu() for name, part in _parts(cache, len(tokens)).items()}
    tensors["tokens"] = torch.tensor(tokens)
    with atomic_path(path) as target:
        save_file(tensors, target, {"format": FORMAT, "model": _model(model)})


@torch.inference_mode()
def restore(path: str | Path, model: Loaded, cache: KVCache) -> list[int]:
    """Fill the cache from a file; returns the tokens. What it held is gone if the file fits.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, of another model, or longer than the context.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected what `save` wrote")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ValueError(f"{path}: not a saved session (format is not '{FORMAT}')")
            if facts.get("model") != _model(model):
                raise ValueError(
                    f"{path}: saved with another model, dtype, quant or sparse attention than "
                    "this engine's: prefill its text again"
                )
            tokens = file.get_tensor("tokens").tolist()
            if len(tokens) > cache.max_context:
                raise ValueError(
                    f"{path}: {len(tokens)} tokens are above max_context={cache.max_context}"
                )
            cache.length = 0  # what was there need not be copied
            cache.reserve(len(tokens))
            parts = _parts(cache, len(tokens))
            for name, part in parts.items():
                shape = file.get_slice(name).get_shape()
                if shape != list(part.shape):
                    raise ValueError(
                        f"{path}: '{name}' has shape {shape}, expected {list(part.shape)}"
                    )
                part.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({error}): prefill its text again") from None
    cache.length = len(tokens)
    return tokens

"""A session on disk: tokens, keys and values in one safetensors file."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import dtypes
from cpmcu._files import atomic_path
from cpmcu._torch import torch
from cpmcu.cache import KVCache
from cpmcu.safetensors_file import DTYPES, SafetensorsFile, write

if TYPE_CHECKING:
    from cpmcu.session import Loaded

FORMAT = "cpmcu session 1"


def _model(model: Loaded) -> str:
    """What must be equal for keys and values to mean the same, hashed. The weights themselves are
    not compared: who swaps them keeps a cache that no longer fits.
    """
    facts = f"{model.spec!r} torch.{model.dtype} {model.quant}"
    facts = facts.replace(repr(model.spec.source), "")
    return hashlib.sha256(facts.encode()).hexdigest()


def _parts(cache: KVCache, length: int) -> dict[str, tuple[str, Any]]:
    """Views of what is valid at `length` tokens, by name: (dtype's name, array or tensor)."""
    parts = {
        f"layers.{i}": (cache.dtype, arena[:, :, :length]) for i, arena in enumerate(cache.layers)
    }
    if cache.sparse is not None:
        for name, held, count in zip(
            ("fine", "coarse"), (cache.fine, cache.coarse), cache.sparse.kernels(length),
            strict=True,
        ):  # fmt: skip
            parts |= {f"{name}.{i}": (cache.floats, rows[:, :count]) for i, rows in enumerate(held)}
    return parts


def save(path: str | Path, model: Loaded, tokens: list[int], cache: KVCache) -> None:
    """Write a sequence, whole or not at all.

    Raises:
        ValueError: it has no tokens.
    """
    if not tokens:
        raise ValueError("there is nothing to save: the sequence has no tokens")
    tensors = {
        name: (kind, part if isinstance(part, np.ndarray) else dtypes.to_numpy(part))
        for name, (kind, part) in _parts(cache, len(tokens)).items()
    }
    tensors["tokens"] = "int64", np.array(tokens, np.int64)
    with atomic_path(path) as target:
        write(target, tensors, {"format": FORMAT, "model": _model(model)})


def restore(path: str | Path, model: Loaded, cache: KVCache) -> list[int]:
    """Fill the cache from a file; returns the tokens. What it held is gone if the file fits.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, of another model, or longer than the context.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected what `save` wrote")
    try:
        file = SafetensorsFile(Path(path))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}): prefill its text again") from None
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a saved session (format is not '{FORMAT}')")
    if file.metadata.get("model") != _model(model):
        raise ValueError(
            f"{path}: saved with another model, dtype, quant or sparse attention than "
            "this engine's: prefill its text again"
        )
    ids = _checked(file, "tokens", "int64", None)
    if len(ids) > cache.max_context:
        raise ValueError(f"{path}: {len(ids)} tokens are above max_context={cache.max_context}")
    cache.length = 0  # what was there need not be copied
    with nullcontext() if cache.device is None else torch.inference_mode():
        cache.reserve(len(ids))
        for name, (kind, part) in _parts(cache, len(ids)).items():
            values = _checked(file, name, kind, tuple(part.shape))
            if isinstance(part, np.ndarray):
                part[...] = values
            else:
                part.copy_(dtypes.to_torch(values.copy(), kind))
    cache.length = len(ids)
    return ids.tolist()


def _checked(
    file: SafetensorsFile, name: str, kind: str, shape: tuple[int, ...] | None
) -> np.ndarray:
    """A tensor of the file; ValueError unless it is there with that dtype and shape."""
    info = file.tensors.get(name)
    if info is None:
        raise ValueError(f"{file.path}: damaged ('{name}' is missing): prefill its text again")
    if DTYPES.get(info.dtype) != kind or (shape is not None and info.shape != shape):
        raise ValueError(
            f"{file.path}: '{name}' has shape {list(info.shape)} and dtype {info.dtype}, expected "
            f"{kind} {'' if shape is None else list(shape)}"
        )
    return file.array(name)

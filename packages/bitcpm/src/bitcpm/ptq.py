"""Ternary weights without training: the absmean quantiser applied to a finished model.

This measures; it does not make a good model. Ternary weights are learnt by QAT, and rounding a
trained model to them destroys it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import atomic_path, write_json
from .checkpoint import DTYPES, Checkpoint, copy_companions, write_shards
from .config import TernaryConfig
from .convert import check_target, unquantised_config
from .inspect import is_candidate
from .qat import fake_quantise
from .recover import looks_ternary


@dataclass(frozen=True, slots=True)
class QuantiseReport:
    """What rounding cost.

    Attributes:
        error: ||W - Wq|| / ||W|| over all quantised weights (Frobenius).
        zero_share: share of zeros among them.
        tensors: quantised matrices: name to its own relative error.
    """

    error: float
    zero_share: float
    tensors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self)


def quantise_model(
    src_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: TernaryConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantiseReport:
    """Write a model folder whose decoder matrices are pseudo-quantised, with the error measured.

    As there is no model, only its files, the decoder's matrices are known by their names: two
    dimensions, `.weight` at the end, and a layer number in between ("model.layers.3.…").

    Args:
        src_dir: model folder with safetensors files, not quantised.
        out_dir: folder to write, atomically; one that exists is replaced.
        config: defaults to TernaryConfig().
        progress: called with (tensors done, tensors in all).

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: nothing to quantise; a matrix is ternary already, or holds NaN or infinity.
    """
    config = config or TernaryConfig()
    source, target = Path(src_dir), Path(out_dir)
    check_target(source, target)
    model_config = unquantised_config(source)
    errors: dict[str, float] = {}
    zeros = count = 0
    lost = power = 0.0
    done = 0
    with Checkpoint(source) as checkpoint, atomic_path(target) as folder:
        names = checkpoint.names()

        def chosen(name: str) -> bool:
            in_layer = any(part.isdigit() for part in name.split("."))
            matrix = is_candidate(checkpoint.shape(name), checkpoint.dtype(name))
            return matrix and in_layer and name.endswith(".weight") and not config.skips(name)

        def read(name: str) -> Tensor:
            nonlocal done, zeros, count, lost, power
            w = checkpoint.tensor(name)
            done += 1
            if progress:
                progress(done, len(names))
            if not chosen(name):
                return w
            if not torch.isfinite(w).all():
                raise ValueError(f"{name} holds NaN or infinity: mend {source} first")
            if looks_ternary(w):
                raise ValueError(
                    f"{name} is ternary already, and absmean would shrink its scales: "
                    "pack it as it is"
                )
            q = fake_quantise(w, config)
            squares = (w.double() - q.double()).square().sum().item()
            total = w.double().square().sum().item()
            errors[name] = sqrt(squares / total) if total else 0.0
            lost, power = lost + squares, power + total
            zeros, count = zeros + int((q == 0).sum()), count + q.numel()
            return q

        if not any(chosen(name) for name in names):
            raise ValueError(f"{source} has no decoder matrix outside skip={config.skip}")
        folder.mkdir()
        copy_companions(source, folder)
        write_shards(folder, names, lambda name: _bytes_of(checkpoint, name), read)
        if model_config:
            write_json(folder / "config.json", model_config)
    return QuantiseReport(sqrt(lost / power) if power else 0.0, zeros / count, errors)


def _bytes_of(checkpoint: Checkpoint, name: str) -> int:
    # For the shards' sizes only: what is no float weight is small.
    dtype = DTYPES.get(checkpoint.dtype(name))
    return torch.Size(checkpoint.shape(name)).numel() * (dtype.itemsize if dtype else 8)

"""The packed checkpoint, format version 1: one safetensors file.

A ternary matrix NAME is two tensors, `NAME.codes` (uint8, see `packing`) and `NAME.scales` (the
dtype the weights had). Every other tensor is there under its own name and in its own dtype. The
file's `__metadata__` has one key, `bitcpm` (safetensors writes several keys in an order that
changes from run to run, and equal models are to give equal bytes), which holds a JSON object:

    {"version": 1,
     "tensors": {"model.layers.0.mlp.up_proj.weight":
                     {"shape": [1024, 256], "dtype": "BF16", "group_size": 128, "codec": "1.6bit"}}}

A packed file may come from anyone. All sizes are checked against the file's own header before a
tensor is read, so that the weights made of it are at most 20 bytes for each stored byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ._files import atomic_path
from .checkpoint import DTYPES, Checkpoint
from .entries import FORMAT, VERSION
from .entries import read as read_entries
from .packing import PackedTensor

QUANT_METHOD = "bitcpm"


def save_packed(
    path: str | os.PathLike[str], packed: Mapping[str, PackedTensor], plain: Mapping[str, Tensor]
) -> None:
    """Write a packed file, atomically.

    Args:
        path: the file to write.
        packed: ternary matrices by their name in the model.
        plain: everything else.

    Raises:
        ValueError: nothing to pack, or two tensors would get the same name.
    """
    if not packed:
        raise ValueError("there is no ternary tensor to pack")
    names = {value: key for key, value in DTYPES.items()}
    tensors: dict[str, Tensor] = {name: t.contiguous() for name, t in plain.items()}
    entries: dict[str, Any] = {}
    for name, p in packed.items():
        parts = {f"{name}.codes": p.codes, f"{name}.scales": p.scales}
        if clash := tensors.keys() & {name, *parts}:
            raise ValueError(f"cannot pack {name}: the model has a tensor {min(clash)} as well")
        tensors |= {part: t.contiguous() for part, t in parts.items()}
        entries[name] = {
            "shape": list(p.shape),
            "dtype": names[p.scales.dtype],
            "group_size": p.group_size,
            "codec": p.codec,
        }
    header = json.dumps({"version": VERSION, "tensors": entries})
    with atomic_path(path) as target:
        save_file(tensors, target, {FORMAT: header})


class PackedFile:
    """A packed folder or file, opened and checked; a context manager.

    Attributes:
        entries: the ternary matrices.
        plain: names of the other tensors, sorted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a packed file, has another version, or contradicts itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._checkpoint = Checkpoint(path)
        try:
            self.entries, self.plain = read_entries(self._checkpoint)
        except BaseException:
            self._checkpoint.__exit__()
            raise

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoint.__exit__()

    def names(self) -> list[str]:
        """Names of the model's tensors, sorted."""
        return sorted([*self.entries, *self.plain])

    def packed(self, name: str) -> PackedTensor:
        """Read one ternary matrix as it is stored."""
        entry = self.entries[name]
        codes = self._checkpoint.tensor(f"{name}.codes")
        scales = self._checkpoint.tensor(f"{name}.scales")
        return PackedTensor(codes, scales, entry.shape, entry.group_size, entry.codec)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor of the model, dequantised.

        `dtype` applies to floating-point tensors; None keeps what the model had.
        """
        if name in self.entries:
            try:
                return self.packed(name).dequantise(dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        t = self._checkpoint.tensor(name)
        return t.to(dtype) if dtype is not None and t.is_floating_point() else t

    def bytes_of(self, name: str) -> int:
        """Bytes of a tensor of the model when it is dequantised to the dtype it had."""
        if name in self.entries:
            entry = self.entries[name]
            return entry.shape[0] * entry.shape[1] * DTYPES[entry.dtype].itemsize
        return self._checkpoint.tensor(name).nbytes

    def plain_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that is not packed."""
        return self._checkpoint.shape(name)

    def plain_dtype(self, name: str) -> str:
        """Dtype of a tensor that is not packed, as safetensors calls it."""
        return self._checkpoint.dtype(name)


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether the file says that it is a packed one."""
    return FORMAT in checkpoint.metadata


def load_packed(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of a packed model by name, dequantised.

    Args:
        path: packed folder or file.
        dtype: of the floating-point tensors; None keeps what the model had, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a packed one.
    """
    with PackedFile(path) as file:
        return {name: file.tensor(name, dtype) for name in file.names()}

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ._files import atomic_path
from .checkpoint import DTYPES, Checkpoint
from .config import check_group_size
from .packing import CODECS, PackedTensor

VERSION = 1
FORMAT = "bitcpm"
QUANT_METHOD = "bitcpm"


@dataclass(frozen=True, slots=True)
class Entry:
    """What the metadata says of one packed matrix."""

    shape: tuple[int, int]
    dtype: str
    group_size: int
    codec: str


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
            self.entries = _read_entries(self._checkpoint)
            stored = set(self._checkpoint.names())
            for name, entry in self.entries.items():
                stored -= _check_entry(self._checkpoint, name, entry)
            if both := stored & self.entries.keys():
                raise ValueError(f"{path}: {min(both)} is there twice, packed and not")
            self.plain = sorted(stored)
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


def _read_entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    where = Path(checkpoint.path)
    if not is_packed(checkpoint):
        raise ValueError(f"{where} is not a packed model: make one with `bitcpm pack`")
    try:
        header = json.loads(checkpoint.metadata.get(FORMAT, ""))
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: the bitcpm metadata is not valid JSON") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise ValueError(
            f"{where} is packed in format version {version!r}, this release reads {VERSION}: "
            "use the release that wrote it"
        )
    tensors = header.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{where}: the bitcpm metadata lists no tensors")
    return {name: _parse_entry(f"{where}: {name}", value) for name, value in tensors.items()}


def _parse_entry(where: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != set(Entry.__slots__):
        raise ValueError(f"{where}: the entry must have {', '.join(Entry.__slots__)}")
    shape = value["shape"]
    # A bool is an int to Python, and True is no size.
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int for n in shape):
        raise ValueError(f"{where}: shape must be two whole numbers, got {shape!r}")
    # type() rather than `in`: a list is no key, and would raise TypeError.
    for field, allowed in (("dtype", DTYPES), ("codec", CODECS)):
        if not isinstance(value[field], str) or value[field] not in allowed:
            raise ValueError(f"{where}: {field} must be one of {', '.join(allowed)}")
    try:
        check_group_size(value["group_size"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Entry((shape[0], shape[1]), value["dtype"], value["group_size"], value["codec"])


def _check_entry(checkpoint: Checkpoint, name: str, entry: Entry) -> set[str]:
    """Compare an entry with the stored tensors' headers; their names."""
    try:
        shapes = PackedTensor.expected_shapes(entry.shape, entry.group_size, entry.codec)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {name}: {error}") from None
    stored = set(checkpoint.names())
    parts = (f"{name}.codes", f"{name}.scales")
    for part, shape, dtype in zip(parts, shapes, ("U8", entry.dtype), strict=True):
        if part not in stored:
            raise ValueError(f"{checkpoint.path}: tensor {part} is missing")
        found = checkpoint.dtype(part), checkpoint.shape(part)
        if found != (dtype, shape):
            raise ValueError(
                f"{checkpoint.path}: {part} must be {dtype} {list(shape)} for a matrix of "
                f"{list(entry.shape)}, got {found[0]} {list(found[1])}"
            )
    return set(parts)

"""What the header of a packed file says of each ternary matrix, checked; `format` describes it.

Needs no PyTorch: the tensors' names, dtypes and shapes come from whoever has opened the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .arrays import CODECS, expected_shapes
from .config import check_group_size

VERSION = 1
FORMAT = "bitcpm"
FLOATS = ("F32", "BF16", "F16")  # safetensors' names of the dtypes that weights can have


class Opened(Protocol):
    """A safetensors file that somebody has opened, such as `checkpoint.Checkpoint`."""

    path: str | os.PathLike[str]
    metadata: Mapping[str, str]

    def names(self) -> list[str]:
        """Of all tensors."""

    def dtype(self, name: str) -> str:
        """As safetensors calls it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the metadata says of one packed matrix."""

    shape: tuple[int, int]
    dtype: str
    group_size: int
    codec: str


def read(file: Opened) -> tuple[dict[str, Entry], list[str]]:
    """The packed matrices of a file by name, and the names of its other tensors, sorted.

    Raises:
        ValueError: it is not a packed file, has another version, or contradicts itself.
    """
    entries, stored = _read_entries(file), set(file.names())
    for name, entry in entries.items():
        stored -= _check_entry(file, name, entry)
    if both := stored & entries.keys():
        raise ValueError(f"{file.path}: {min(both)} is there twice, packed and not")
    return entries, sorted(stored)


def _read_entries(file: Opened) -> dict[str, Entry]:
    where = Path(file.path)
    if FORMAT not in file.metadata:
        raise ValueError(f"{where} is not a packed model: make one with `bitcpm pack`")
    try:
        header = json.loads(file.metadata.get(FORMAT, ""))
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
    for field, allowed in (("dtype", FLOATS), ("codec", CODECS)):
        if not isinstance(value[field], str) or value[field] not in allowed:
            raise ValueError(f"{where}: {field} must be one of {', '.join(allowed)}")
    try:
        check_group_size(value["group_size"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Entry((shape[0], shape[1]), value["dtype"], value["group_size"], value["codec"])


def _check_entry(file: Opened, name: str, entry: Entry) -> set[str]:
    """Compare an entry with the stored tensors' headers; their names."""
    try:
        shapes = expected_shapes(entry.shape, entry.group_size, entry.codec)
    except ValueError as error:
        raise ValueError(f"{file.path}: {name}: {error}") from None
    stored = set(file.names())
    parts = (f"{name}.codes", f"{name}.scales")
    for part, shape, dtype in zip(parts, shapes, ("U8", entry.dtype), strict=True):
        if part not in stored:
            raise ValueError(f"{file.path}: tensor {part} is missing")
        found = file.dtype(part), file.shape(part)
        if found != (dtype, shape):
            raise ValueError(
                f"{file.path}: {part} must be {dtype} {list(shape)} for a matrix of "
                f"{list(entry.shape)}, got {found[0]} {list(found[1])}"
            )
    return set(parts)

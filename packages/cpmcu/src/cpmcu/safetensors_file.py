"""A safetensors file as arrays over its own memory, and writing one, both without PyTorch.

`safetensors` itself checks the header (sizes, offsets, dtypes) when a file is opened, and gives the
tensors' shapes; what is added here is where they lie, so that nothing is copied to be read.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from cpmcu import dtypes

DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64",
    "I32": "int32", "I8": "int8", "U8": "uint8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Info:
    """A tensor: `dtype` as safetensors calls it, and its place in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An opened file: `tensors` by name, `metadata`.

    Raises:
        ValueError: it is damaged, or none.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="np") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            size = int.from_bytes(self._data[:8], "little")
            header = json.loads(self._data[8 : 8 + size])
            self.tensors = {
                name: _info(entry, 8 + size, len(self._data))
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (SafetensorError, OSError, ValueError, OverflowError, RecursionError,
                TypeError, KeyError) as error:  # fmt: skip
            raise ValueError(
                f"{path}: not a valid safetensors file ({error}); copy it again"
            ) from None

    def array(self, name: str) -> np.ndarray:
        """A tensor, read-only, over the file's memory; bfloat16 as its bits."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(
                f"{self.path}: tensor '{name}' has dtype {info.dtype}, expected one of {known}"
            )
        raw = np.frombuffer(self._data, np.uint8, info.end - info.begin, info.begin)
        kind = np.dtype(dtypes.STORED[DTYPES[info.dtype]])
        if info.begin % kind.itemsize:  # old files are not aligned
            raw = raw.copy()
        return raw.view(kind).reshape(info.shape)

    def release(self) -> None:
        """Give back the memory of what was read: the system reads it again when it is asked for."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)


def _info(entry: dict[str, object], start: int, size: int) -> Info:
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    kind = DTYPES.get(entry["dtype"])
    if not 0 <= begin <= end <= size - start:
        raise ValueError("offsets beyond the end")
    if kind is not None and end - begin != prod(shape) * dtypes.size_of(kind):
        raise ValueError("a shape that is not that of the bytes")
    return Info(entry["dtype"], shape, start + begin, start + end)


def write(
    path: Path, tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str]
) -> None:
    """Write named (dtype's name, array); an array of bits where the dtype is bfloat16. One after
    the other: nothing is held twice.
    """
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    # The widest first, as safetensors does: then all are aligned.
    order = sorted(tensors, key=lambda name: (-dtypes.size_of(tensors[name][0]), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        kind, array = tensors[name]
        if array.dtype != dtypes.STORED[kind]:
            raise ValueError(
                f"tensor '{name}' of {kind} needs an array of "
                f"{np.dtype(dtypes.STORED[kind])}, got {array.dtype}"
            )
        header[name] = {
            "dtype": names[kind], "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(np.ascontiguousarray(tensors[name][1]).data)

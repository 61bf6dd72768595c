"""Open a GGUF file without trusting it: every count, length and offset is checked before use.

The format is ggml's GGUF version 2 and 3, little endian: a header, typed key-value metadata,
tensor descriptions, then aligned tensor data. The `gguf` package's own reader walks past the end
of a truncated file for as long as a hostile count tells it to, so only its dequantiser is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import cpu_library
from cpmcu._torch import torch
from cpmcu.ggml_types import Kind, kind_of

if TYPE_CHECKING:
    from torch import Tensor

# GGUF value type -> struct code; 8 is a string, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": "<f4", "F16": "<f2"}
# Rows are dequantised in pieces of about this many values, so that an 8B head costs no extra GB.
_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major as in PyTorch (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    offset: int
    nbytes: int


class GGUFFile:
    """Metadata and tensors of a GGUF file, memory-mapped. ValueError names the file and the fault.

    Attributes: `path`, `metadata` (key -> Python value), `tensors` (name -> TensorInfo).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a GGUF model")
        if path.stat().st_size < 24:
            raise self.error(f"has {path.stat().st_size} bytes, too few for a GGUF header")
        with path.open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._take(4) != b"GGUF":
            raise self.error("does not start with 'GGUF'; it is another kind of file")
        version = self._scalar("I")
        if version not in (2, 3):
            raise self.error(f"is GGUF version {version}, supported are 2 and 3 (little endian)")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        # No list is sized by a count from the file: each entry takes bytes, so a false count ends
        # at the end of the file.
        for _ in range(field_count):
            key = self._text()
            if key in self.metadata:
                raise self.error(f"has metadata key '{key}' twice")
            self.metadata[key] = self._value(key, self._scalar("I"))
        self.tensors = self._tensor_infos(tensor_count)

    def error(self, complaint: str) -> ValueError:
        """The ValueError "path: complaint"."""
        return ValueError(f"{self.path}: {complaint}")

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise self.error(
                f"ends at byte {len(self._data)} but an entry at {self._at} needs {count} bytes: "
                "truncated or corrupt, copy it again"
            )
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _scalar(self, code: str) -> Any:
        if code == "?":  # any byte but 0 is true
            return self._take(1) != b"\0"
        return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

    def _text(self) -> str:
        raw = self._take(self._scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"has text that is not UTF-8 before byte {self._at}") from None

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise self.error(f"metadata '{key}' has unknown type {kind}")
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._scalar("Q")
        if item == _STRING:
            return self._texts(count)
        if item not in _SCALARS:
            raise self.error(f"metadata '{key}' is an array of unknown type {item}")
        code = _SCALARS[item]
        raw = self._take(count * struct.calcsize(code))
        return np.frombuffer(raw, np.dtype(code).newbyteorder("<")).tolist()

    def _texts(self, count: int) -> list[str]:
        library, _ = cpu_library.kernels()
        whole = np.frombuffer(self._data, np.uint8)
        joined = library.texts(whole, self._at, count) if library is not None and count else None
        if joined is None:  # or to say what is wrong
            return [self._text() for _ in range(count)]
        raw, self._at = joined
        try:
            return raw.decode("utf-8").split("\0")[:-1]
        except UnicodeDecodeError:
            raise self.error(f"has text that is not UTF-8 before byte {self._at}") from None

    def _tensor_infos(self, count: int) -> dict[str, TensorInfo]:
        entries = []
        for _ in range(count):
            name = self._text()
            dimensions = self._scalar("I")
            if not 1 <= dimensions <= 4:
                raise self.error(f"tensor '{name}' has {dimensions} dimensions, expected 1 to 4")
            shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
            entries.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= 1 << 20
            or alignment & alignment - 1
        ):
            raise self.error(f"general.alignment must be a power of two, got {alignment}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, raw_kind, offset in entries:
            kind = kind_of(raw_kind)
            if kind is None:
                raise self.error(f"tensor '{name}' has unknown type {raw_kind}")
            if name in tensors:
                raise self.error(f"has tensor '{name}' twice")
            if min(shape) < 1 or shape[-1] % kind.block:
                raise self.error(f"tensor '{name}' of {shape} does not fill {kind.name} blocks")
            nbytes = prod(shape) // kind.block * kind.size
            if offset % alignment or start + offset + nbytes > len(self._data):
                raise self.error(
                    f"tensor '{name}' lies at bytes {start + offset} to {start + offset + nbytes} "
                    f"of {len(self._data)}: truncated or corrupt, copy it again"
                )
            tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)
        return tensors

    def release(self) -> None:
        """Give back the memory of what was read: the system reads it again when it is asked for."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8, as they lie in the file."""
        info = self.tensors[name]
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Dequantised float32 pieces of a tensor: first row (index of axis 0), [rows, ...]."""
        info = self.tensors[name]
        width = prod(info.shape[1:]) if len(info.shape) > 1 else info.shape[0]
        rows = prod(info.shape) // width
        row_bytes = width // info.kind.block * info.kind.size
        raw = self.raw(name).reshape(rows, row_bytes)
        step = max(1, _PIECE // width)
        for first in range(0, rows, step):
            piece = raw[first : first + step]
            if info.kind.name in _PLAIN:
                values = np.array(piece.view(_PLAIN[info.kind.name]), dtype=np.float32)
            else:
                values = self._expanded(name, piece)
            shape = values.shape if len(info.shape) > 1 else info.shape
            yield first, values.reshape(shape)

    def _expanded(self, name: str, rows: np.ndarray) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = self.tensors[name].kind
        try:
            # A corrupt scale may overflow: the infinity is reported when it reaches the logits.
            with np.errstate(all="ignore"):
                values = dequantize(rows, GGMLQuantizationType(kind.number))
        except NotImplementedError:
            raise self.error(
                f"tensor '{name}' has type {kind.name}, which gguf cannot dequantise"
            ) from None
        return np.array(values, dtype=np.float32)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor, dequantised; of float32 by default."""
        pieces = [
            torch.from_numpy(piece).to(dtype or torch.float32) for _, piece in self.pieces(name)
        ]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return whole.reshape(self.tensors[name].shape)

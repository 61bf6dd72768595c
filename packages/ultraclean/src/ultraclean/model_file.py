"""fastText's own files, `.bin` and quantised `.ftz`, read (and `.bin` written) without fastText.

The layout is the library's of version 12 (and 11): header, settings, dictionary, input matrix,
output matrix, little-endian and unaligned. Dense matrices are mapped, not read; a quantised matrix
is decoded a block of rows at a time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_MAGIC, _VERSIONS = 793712314, (11, 12)
_SETTINGS = ("dim", "ws", "epoch", "min_count", "neg", "word_ngrams", "loss", "model", "bucket",
             "minn", "maxn", "lr_update_rate")  # fmt: skip
LOSSES = {1: "hs", 2: "ns", 3: "softmax", 4: "ova"}
SOFTMAX, SUPERVISED = 3, 3
_WORD, _LABEL = 0, 1


class DenseMatrix:
    """fp32 `[rows, dim]`, mapped."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape = values.shape

    def rows(self, begin: int, end: int) -> np.ndarray:
        """fp32 `[end - begin, dim]`."""
        return np.asarray(self.values[begin:end])


@dataclass
class ProductQuantiser:
    """fastText's: each row in parts of `dsub` numbers, each part one of 256 centroids."""

    dim: int
    parts: int
    dsub: int
    last: int
    centroids: np.ndarray

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """fp32 `[rows, dim]` of codes uint8 `[rows, parts]`."""
        made = np.empty((len(codes), self.dim), np.float32)
        for part in range(self.parts):
            width = self.last if part == self.parts - 1 else self.dsub
            start = part * 256 * self.dsub
            table = self.centroids[start : start + 256 * width].reshape(256, width)
            made[:, part * self.dsub : part * self.dsub + width] = table[codes[:, part]]
        return made


@dataclass
class QuantisedMatrix:
    """Codes of rows, and of their norms where those are kept apart."""

    shape: tuple[int, int]
    codes: np.ndarray
    quantiser: ProductQuantiser
    norms: tuple[np.ndarray, ProductQuantiser] | None

    def rows(self, begin: int, end: int) -> np.ndarray:
        """fp32 `[end - begin, dim]`."""
        made = self.quantiser.decode(self.codes[begin:end])
        if self.norms is not None:
            codes, quantiser = self.norms
            made *= quantiser.decode(codes[begin:end, None])
        return made


@dataclass
class ModelFile:
    """A parsed model.

    Attributes:
        settings: the library's training settings.
        words: in row order. labels: in the order of the output matrix.
        pruned: n-gram bucket -> row after the words', for a model that lacks the others.
        inputs: `[words + buckets, dim]`. outputs: fp32 `[labels, dim]`.
    """

    settings: dict[str, int]
    words: list[bytes]
    labels: list[str]
    pruned: dict[int, int] | None
    inputs: DenseMatrix | QuantisedMatrix
    outputs: np.ndarray
    label_counts: list[int] = field(default_factory=list)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, "u1")
        self.at = 0

    def raw(self, size: int) -> np.ndarray:
        if size < 0 or self.at + size > len(self.data):
            raise ValueError(f"{self.path} is cut short or no fastText model: fetch it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, layout: str) -> tuple[int, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.raw(struct.calcsize(layout)).tobytes())

    def floats(self, count: int) -> np.ndarray:
        return self.raw(4 * count).view("<f4")

    def dense(self) -> np.ndarray:
        rows, dim = self._shape()
        return self.floats(rows * dim).reshape(rows, dim)

    def _shape(self) -> tuple[int, int]:
        rows, dim = self.unpack("qq")
        if not (0 <= rows < 1 << 40 and 0 < dim < 1 << 20):
            raise ValueError(f"{self.path}: a matrix of {rows} × {dim}: the file is damaged")
        return rows, dim

    def quantiser(self) -> ProductQuantiser:
        dim, parts, dsub, last = self.unpack("4i")
        if not 0 < dim < 1 << 20 or not 0 < parts <= dim or not 0 < dsub <= dim:
            raise ValueError(f"{self.path}: a quantiser of {dim} numbers: the file is damaged")
        return ProductQuantiser(dim, parts, dsub, last, self.floats(dim * 256))

    def quantised(self) -> QuantisedMatrix:
        (with_norms,) = self.unpack("?")
        rows, dim = self._shape()
        (size,) = self.unpack("i")
        codes, quantiser = self.raw(size), self.quantiser()
        norms = (self.raw(rows), self.quantiser()) if with_norms else None
        return QuantisedMatrix((rows, dim), codes.reshape(rows, -1), quantiser, norms)


def read(path: str | os.PathLike[str]) -> ModelFile:
    """Parse a `.bin` or `.ftz`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no fastText model, damaged, or of another version.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a fastText model, .bin or .ftz")
    reader = _Reader(file)
    magic, version = reader.unpack("ii")
    if magic != _MAGIC or version not in _VERSIONS:
        raise ValueError(
            f"{file} is no fastText model of version 11 or 12 (it says {magic}, {version})"
        )
    settings = dict(zip(_SETTINGS, reader.unpack("12i"), strict=True))
    reader.unpack("d")  # the sampling threshold
    if version == 11 and settings["model"] == SUPERVISED:
        settings["maxn"] = 0  # as the library does
    words, labels, label_counts, pruned = _dictionary(reader)
    (quantised,) = reader.unpack("?")
    inputs = reader.quantised() if quantised else DenseMatrix(reader.dense())
    (quantised_output,) = reader.unpack("?")
    if quantised and quantised_output:
        matrix = reader.quantised()
        outputs = matrix.rows(0, matrix.shape[0])
    else:
        outputs = reader.dense()
    return ModelFile(settings, words, labels, pruned, inputs, outputs, label_counts)


def _dictionary(
    reader: _Reader,
) -> tuple[list[bytes], list[str], list[int], dict[int, int] | None]:
    size, n_words, n_labels = reader.unpack("3i")
    _, pruned_size = reader.unpack("qq")
    words: list[bytes] = []
    labels: list[str] = []
    counts: list[int] = []
    # A word, its end, a count of 8 bytes, a type of 1: looked for in pieces, not byte by byte.
    for _ in range(size):
        step, end = 64, -1
        while end < 0:
            piece = bytes(reader.data[reader.at : reader.at + step])
            end = piece.find(b"\0")
            if end < 0 and len(piece) < step:
                raise ValueError(f"{reader.path} is cut short: fetch it again")
            step *= 16
        entry = reader.raw(end + 10).tobytes()
        count, kind = struct.unpack("<qb", entry[end + 1 :])
        if kind == _LABEL:
            labels.append(entry[:end].decode("utf-8", "replace"))
            counts.append(count)
        elif kind == _WORD:
            words.append(entry[:end])
        else:
            raise ValueError(f"{reader.path}: an entry of type {kind}: the file is damaged")
    if (len(words), len(labels)) != (n_words, n_labels):
        raise ValueError(f"{reader.path}: its dictionary does not add up: the file is damaged")
    if pruned_size < 0:
        return words, labels, counts, None
    pairs = reader.raw(8 * pruned_size).view("<i4").reshape(-1, 2)
    return words, labels, counts, {int(a): int(b) for a, b in pairs}


def write(path: str | os.PathLike[str], model: ModelFile, word_counts: Sequence[int]) -> None:
    """Write a `.bin` of version 12 that fastText loads.

    Args:
        path: the file.
        model: a dense one that is not pruned.
        word_counts: how often each word came, in row order; fastText keeps them.
    """
    words = zip(model.words, word_counts, [_WORD] * len(model.words), strict=True)
    labels = zip(
        [label.encode() for label in model.labels], model.label_counts,
        [_LABEL] * len(model.labels), strict=True,
    )  # fmt: skip
    total = sum(word_counts) + sum(model.label_counts)
    sizes = len(model.words) + len(model.labels), len(model.words), len(model.labels)
    with Path(path).open("wb") as stream:
        stream.write(struct.pack("<ii", _MAGIC, _VERSIONS[-1]))
        stream.write(struct.pack("<12id", *(model.settings[name] for name in _SETTINGS), 1e-4))
        stream.write(struct.pack("<3i2q", *sizes, total, -1))  # -1: not pruned
        for name, count, kind in (*words, *labels):
            stream.write(name + b"\0" + struct.pack("<qb", count, kind))
        for matrix in (model.inputs.rows(0, model.inputs.shape[0]), model.outputs):
            stream.write(struct.pack("<?qq", False, *matrix.shape))
            np.ascontiguousarray(matrix, "<f4").tofile(stream)

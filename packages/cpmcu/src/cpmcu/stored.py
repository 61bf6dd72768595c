"""Weights as they lie in a file or in memory: what the CPU backend lays out, with no copy between.

A matrix is several parts, one below the other: of tensors that are multiplied together, or pieces
of one that has to be expanded first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpmcu import dtypes
from cpmcu.codes import Codes

# Codes: bits of each; columns and bytes of its block where a file's format sets them.
BITS = {"int8": 8, "nibbles": 4, "Q4_0": 4, "Q8_0": 8, "Q4_1": 4, "Q4_K": 4}
_BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_1": (32, 20), "Q4_K": (256, 144)}
SHIFTED = ("Q4_1", "Q4_K")  # whose weights are code * scale + shift


@dataclass(slots=True)
class Part:
    """Rows of a matrix.

    Attributes:
        memory: an array or a tensor, contiguous, that holds them.
        source: what is in it: "float32", "bfloat16", "float16"; codes: "int8" around 0, "nibbles"
            (`layout`), "Q4_0", "Q8_0", "Q4_1", "Q4_K" (`csrc/lay_out.hpp`).
        shape: (rows, columns).
        scales: float16 [rows, columns / group] of "int8" and "nibbles".
        bits: of codes.
        group: columns to a scale.
        heads: not 0: rows in llama.cpp's order, to be put in transformers'.
        fault: what is wrong with the file if a scale is not finite.
    """

    memory: Any
    source: str
    shape: tuple[int, int]
    scales: Any = None
    bits: int = 0
    group: int = 0
    heads: int = 0
    fault: str = "a scale of the weights is not finite"

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        cols = self.shape[1]
        if self.source in _BLOCKS:
            block, size = _BLOCKS[self.source]
            return cols // block * size
        return cols // 2 if self.source == "nibbles" else cols * dtypes.size_of(self.source)

    def floats(self, through: str) -> np.ndarray:
        """The numbers, float32 [rows, columns], rounded to those of `through`."""
        rows, cols = self.shape
        if self.source not in BITS:
            values = (
                _array(self.memory).ravel().view(dtypes.STORED[self.source]).reshape(rows, cols)
            )
            values = dtypes.to_floats(values, self.source, through)
        else:
            values = dtypes.to_floats(self._dequantised(), "float32", through)
        if not self.heads:
            return values
        return values.reshape(self.heads, -1, 2, cols).swapaxes(1, 2).reshape(rows, cols)

    def _dequantised(self) -> np.ndarray:
        rows, cols = self.shape
        raw = _array(self.memory)
        if self.source in SHIFTED:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize

            with np.errstate(all="ignore"):
                values = dequantize(raw.reshape(rows, -1), GGMLQuantizationType[self.source])
            if not np.isfinite(values).all():
                raise ValueError(self.fault)
            return values.reshape(rows, cols)
        if self.source in _BLOCKS:
            blocks = raw.reshape(rows, cols // 32, -1)
            scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
            codes = blocks[..., 2:]
        else:
            scales, codes = _array(self.scales).reshape(rows, -1), raw.reshape(rows, -1)
        if self.source == "nibbles":
            codes = np.stack((codes & 15, codes >> 4), -1).astype(np.int8) - np.int8(8)
        elif self.source == "Q4_0":
            codes = np.concatenate((codes & 15, codes >> 4), -1).astype(np.int8) - np.int8(8)
        codes = codes.view(np.int8).reshape(rows, -1, self.group)
        if not np.isfinite(scales).all():
            raise ValueError(self.fault)
        return (codes.astype(np.float32) * scales.astype(np.float32)[..., None]).reshape(rows, cols)


@dataclass(slots=True)
class Stored:
    """A matrix `[rows, cols]`.

    Attributes:
        parts: gives them, one below the other; they may be made only as they are taken.
        shape: of all.
        dtype: what its numbers are rounded to, "float32" or "bfloat16".
        bits, group: what parts are to be held in; those that are codes of as many bits stay as
            they are. 0: in numbers, or in what the engine holds.
        shifted: some of them have shifts beside their scales.
        ternary: the same matrix as bitcpm packed it, where it did (`ternary.Packed`s).
    """

    parts: Callable[[], Iterable[Part]]
    shape: tuple[int, int]
    dtype: str
    bits: int = 0
    group: int = 0
    ternary: Any = None
    shifted: bool = False

    @property
    def quant(self) -> str | None:
        """ "int4" or "int8", or None: numbers."""
        return f"int{self.bits}" if self.bits else None

    def floats(self) -> np.ndarray:
        """The numbers, float32."""
        parts = [part.floats(self.dtype) for part in self.parts()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def of(weight: Any) -> Stored:
    """A matrix of any kind as a `Stored`: it, `Codes`, or a tensor."""
    if isinstance(weight, Stored):
        return weight
    if isinstance(weight, Codes):
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        part = Part(codes, "int8", weight.shape, scales, weight.bits, weight.group)
        dtype = dtypes.name_of(weight.dtype)
        return Stored(lambda: [part], weight.shape, dtype, weight.bits, weight.group)
    dtype, shape = dtypes.name_of(weight.dtype), tuple(weight.shape)
    part = Part(weight.contiguous(), dtype, shape)
    return Stored(lambda: [part], shape, dtype)


def vector(values: Any) -> np.ndarray:
    """A norm or a bias, a tensor or an array, as float32 of its own."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, np.float32)
    return np.array(values.detach().float().numpy(), np.float32)


def _array(memory: Any) -> np.ndarray:
    return memory if isinstance(memory, np.ndarray) else dtypes.to_numpy(memory)

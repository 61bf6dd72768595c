"""Ternary codes in bytes: four to a byte (2 bits each), or five (1.6 bits each).

A code c in {-1, 0, 1} is stored as the digit d = c + 1. Each row begins on a byte, so that rows can
be cut, and the digits of unused places are 1 (code 0), so that a kernel may multiply them too.

    2bit    byte = d0 + 4 d1 + 16 d2 + 64 d3           all four digits below 3
    1.6bit  byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4    byte <= 242

Letters: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import arrays
from .arrays import CODECS as CODECS
from .arrays import bytes_per_row, codec_of
from .config import TernaryConfig, check_group_size
from .recover import recover
from .reference import FLOATS, dequantise


def pack_codes(codes: Tensor, codec: str = "1.6bit") -> Tensor:
    """Bytes uint8 [O, bytes_per_row] of codes int8 [O, I] in {-1, 0, 1}.

    Raises:
        ValueError: other codes, shape or dtype, or an unknown codec.
    """
    per_byte, base = codec_of(codec)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 [out, in], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError("codes must be -1, 0 or 1: only the ternary grid can be packed")
    rows, columns = codes.shape
    digits = np.ones((rows, bytes_per_row(columns, codec) * per_byte), np.uint8)
    np.add(codes.cpu().numpy(), 1, out=digits[:, :columns], casting="unsafe")
    digits = digits.reshape(rows, -1, per_byte)
    packed = np.zeros(digits.shape[:2], np.uint8)
    for place in range(per_byte):
        packed += digits[:, :, place] * np.uint8(base**place)
    return torch.from_numpy(packed)


def unpack_codes(packed: Tensor, in_features: int, codec: str = "1.6bit") -> Tensor:
    """Codes int8 [O, in_features] of bytes uint8 [O, bytes_per_row]: undoes `pack_codes`.

    Raises:
        ValueError: the width does not belong to `in_features`, or a byte is not one that
            `pack_codes` writes.
    """
    width = bytes_per_row(in_features, codec)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != width:
        raise ValueError(
            f"packed codes of {in_features} columns must be uint8 [out, {width}] in codec {codec}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    return torch.from_numpy(arrays.unpack(packed.cpu().numpy(), in_features, codec))


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One ternary matrix in its packed form.

    Attributes:
        codes: uint8 [O, bytes_per_row(I, codec)].
        scales: [O, groups], float32, bfloat16 or float16: the dtype the weights had.
        shape: (O, I).
        group_size: >= 1, or -1 for a whole row.
        codec: a key of `CODECS`.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group_size: int
    codec: str = "1.6bit"

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        codes, scales = self.expected_shapes(self.shape, self.group_size, self.codec)
        if tuple(self.codes.shape) != codes or self.codes.dtype != torch.uint8:
            raise ValueError(
                f"codes of a {self.shape} matrix must be uint8 {list(codes)}, "
                f"got {self.codes.dtype} {list(self.codes.shape)}"
            )
        if tuple(self.scales.shape) != scales or self.scales.dtype not in FLOATS:
            raise ValueError(
                f"scales of a {self.shape} matrix in groups of {self.group_size} must be float "
                f"{list(scales)}, got {self.scales.dtype} {list(self.scales.shape)}"
            )

    @staticmethod
    def expected_shapes(
        shape: tuple[int, int], group_size: int, codec: str
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of `codes` and `scales` for a matrix of `shape` (O, I), both >= 1."""
        return arrays.expected_shapes(shape, group_size, codec)

    @classmethod
    def from_weights(
        cls, w: Tensor, group_size: int = 128, codec: str = "1.6bit", name: str = "the matrix"
    ) -> PackedTensor:
        """Pack pseudo-quantised weights [O, I] without loss (see `recover.recover`).

        Raises:
            ValueError: `w` is not ternary in groups of `group_size`.
        """
        check_group_size(group_size)
        codes, scales = recover(w, group_size, name)
        return cls(pack_codes(codes, codec), scales, tuple(w.shape), group_size, codec)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [O, I] and scales [O, groups]."""
        return unpack_codes(self.codes, self.shape[1], self.codec), self.scales

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [O, I]; exact in the dtype of the scales, which is the default."""
        codes, scales = self.unpack()
        if not (torch.isfinite(scales) & (scales >= 0)).all():
            raise ValueError("scales must be finite and >= 0: damaged data")
        return dequantise(codes, scales.to(dtype), TernaryConfig(group_size=self.group_size))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and scales for each weight: 1.725 at best for 1.6bit, g = 128, bf16."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

"""Ternary weights in native code: bitcpm's layout and kernels, run by the engine's threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cpmcu import cpu_library as c
from cpmcu import ternary

CODEC, MODE = "1.6bit", "int8-group"


def is_supported() -> tuple[bool, str]:
    """Whether ternary kernels are there, and why not."""
    installed, reason = ternary.is_installed()
    if not installed:
        return False, reason
    from bitcpm.cpu_library import kernels

    library, reason = kernels()
    return library is not None, reason


@dataclass(slots=True)
class TernaryWeights:
    """`[rows, cols]` ternary weights: a `bitcpm.TernaryMatrix`; `struct` says that what they are
    multiplied by is rows of floats.
    """

    matrix: Any
    struct: Any

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.matrix.nbytes


def pack(weight: Tensor) -> TernaryWeights | None:
    """Lay out a matrix `[rows, cols]` in the largest groups that fit it; None: not ternary."""
    packed = ternary.packed(weight, CODEC)
    if packed is None:
        return None
    from bitcpm import TernaryMatrix

    struct = c.Matrix(None, None, *weight.shape, c.ROWS, 0)
    return TernaryWeights(TernaryMatrix.from_packed(packed), struct)


def product(
    weights: TernaryWeights, x: Tensor, out: Tensor, scratch: Tensor, threads: int,
    bias: Tensor | None,
) -> Any:  # fmt: skip
    """The product's `bitcpm.records.ProductRecords`."""
    from bitcpm.records import ProductRecords

    return ProductRecords(weights.matrix, x, out, scratch, threads, bias=bias, mode=MODE)


def scratch_bytes(weights: TernaryWeights, tokens: int, threads: int) -> int:
    """Bytes of scratch memory that a product takes."""
    from bitcpm.records import scratch_bytes as bytes_of

    return bytes_of(weights.matrix, tokens, threads, MODE)

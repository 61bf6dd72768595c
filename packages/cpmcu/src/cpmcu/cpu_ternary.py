"""Ternary weights in the native engine: bitcpm's layout and kernels, run by the engine's threads.

Weights are taken as they are: what is {-a, 0, a} in every group is laid out exactly, and never
quantised again.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cpmcu import cpu_library as c

CODEC, MODE = "1.6bit", "int8-group"


def is_supported() -> tuple[bool, str]:
    """Whether ternary kernels are there, and why not."""
    if importlib.util.find_spec("bitcpm") is None:
        return False, "ternary weights need bitcpm: pip install minicpm4-bitcpm"
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
    from bitcpm import PackedTensor, TernaryMatrix
    from bitcpm.group_size import fit_sizes
    from bitcpm.recover import looks_ternary

    group = fit_sizes(weight).largest() if looks_ternary(weight) else None
    if group is None:
        return None
    packed = PackedTensor.from_weights(weight, group, CODEC)
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

"""Ternary weights in native code: bitcpm's layout and kernels, run by the engine's threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpmcu import cpu_library as c
from cpmcu import dtypes, huge_pages, stored, ternary

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
    """`[rows, cols]` ternary weights: a `bitcpm.layout.LaidOut`; `struct` says that what they are
    multiplied by is rows of floats.
    """

    matrix: Any
    struct: Any

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.matrix.nbytes


def pack(weight: Any, pool: c.Pool) -> TernaryWeights | None:
    """Lay out a matrix `[rows, cols]`, what `stored.of` takes: as bitcpm packed it, or in the
    largest groups that fit it; None: not ternary.
    """
    given = stored.of(weight)
    found = given.ternary() if given.ternary is not None else None
    if found is None:
        found = ternary.recovered(given.floats())
        if found is None:
            return None
        # The numbers had the engine's dtype, and so their scales have it, exactly.
        if given.dtype == "bfloat16":
            scales = dtypes.to_bfloat16(found.scales)
            found = ternary.Packed(found.codes, scales, "bfloat16", found.group)
    from bitcpm.layout import LaidOut

    def memory(size: int) -> np.ndarray:
        return huge_pages.empty(size, dtype=np.uint8)

    matrix = LaidOut(found.codes, found.scales, found.dtype, found.group, CODEC, memory)
    pool.run(c.Records(matrix.steps))
    matrix.finish()
    return TernaryWeights(matrix, c.Matrix(None, None, None, *given.shape, c.ROWS, 0))


def product(
    weights: TernaryWeights, x: np.ndarray, out: np.ndarray, scratch: np.ndarray, threads: int,
    bias: np.ndarray | None,
) -> Any:  # fmt: skip
    """The product's `bitcpm.records.ProductRecords`."""
    from bitcpm.records import ProductRecords

    return ProductRecords(weights.matrix, x, out, scratch, threads, bias=bias, mode=MODE)


def scratch_bytes(weights: TernaryWeights, tokens: int, threads: int) -> int:
    """Bytes of scratch memory that a product takes."""
    from bitcpm.records import scratch_bytes as bytes_of

    return bytes_of(weights.matrix, tokens, threads, MODE)

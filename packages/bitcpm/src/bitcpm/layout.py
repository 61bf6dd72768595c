"""A ternary matrix in the kernels' layout for an engine that has no PyTorch: NumPy in, laid out by
the engine's own threads. `matrix.TernaryMatrix` is the same with tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from .config import groups_of
from .cpu_library import CODECS, DTYPES, LayoutArgs, Shape, kernels


class LaidOut:
    """A ternary matrix [O, I]; its memory is filled when `steps` have run.

    Args:
        codes: int8 [O, I] in {-1, 0, 1}.
        scales: [O, groups], contiguous; bfloat16 as its bits.
        dtype: of the scales, "float32", "bfloat16" or "float16".
        group_size: >= 1, or -1 for whole rows.
        codec: "2bit" or "1.6bit".
        memory: gives uint8 [size] on a cache line.

    Attributes:
        shape: (O, I).
        steps: (address of the C operation, its arguments), as in `records.ProductRecords`.

    Raises:
        ImportError: the kernels were not built.
        ValueError: the scales are not one for each group.
    """

    def __init__(
        self, codes: np.ndarray, scales: np.ndarray, dtype: str, group_size: int, codec: str,
        memory: Callable[[int], np.ndarray],
    ) -> None:  # fmt: skip
        library, reason = kernels()
        if library is None:
            raise ImportError(reason)
        self._kernels, self.shape = library, codes.shape
        group, full, tail = groups_of(codes.shape[1], group_size)
        wanted = codes.shape[0], full + bool(tail)
        if scales.shape != wanted:
            raise ValueError(
                f"codes {codes.shape} in groups of {group_size} need scales {wanted}, one for each "
                f"group of a row; got {scales.shape}"
            )
        self._shape = Shape(*codes.shape, group, CODECS[codec], DTYPES[f"torch.{dtype}"])
        self.data = memory(library.weight_bytes(self._shape))
        codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
        args = LayoutArgs(self._shape, codes.ctypes.data, scales.ctypes.data, self.data.ctypes.data)
        self._kept = codes, scales
        self.steps: list[tuple[int, ctypes.Structure]] = [(library.lay_out.address.value, args)]

    def finish(self) -> None:
        """Let go of what the steps have read, once they have run."""
        self._kept, self.steps = (), []

    @property
    def nbytes(self) -> int:
        """Bytes of the layout."""
        return self.data.nbytes

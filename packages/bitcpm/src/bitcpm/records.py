"""A ternary product as operations for somebody else's threads: an engine that goes through a list.

`TernaryMatrix.multiply` allocates and runs on PyTorch's threads. Here the arguments are made once,
over memory that stays; only the number of tokens changes from call to call. What is given may be
PyTorch's tensors or NumPy's arrays: PyTorch is not imported.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from .cpu_library import DTYPES, MODES, MultiplyArgs, PrepareArgs

if TYPE_CHECKING:
    from .layout import LaidOut
    from .matrix import Mode, TernaryMatrix

_FLOAT32 = DTYPES["torch.float32"]


class ProductRecords:
    """out [T, O] = x [T, I] W^T + bias, float32, as two operations with a barrier between them.

    Args:
        matrix: W [O, I].
        x: float32 [most_tokens, I], contiguous; read when the operations run.
        out: float32 [most_tokens, O], contiguous; written then.
        scratch: uint8, `scratch_bytes` of it, on a cache line; products that do not overlap in
            time may share it.
        threads: that go through the operations together, at most.
        bias: float32 [O] or None.
        mode: how activations are rounded, as in `TernaryMatrix.multiply`.

    Attributes:
        steps: (address of the C operation, its arguments), to be called as
            `operation(arguments, ith, nth)` by each of nth threads; see `csrc/args.h`.

    Raises:
        ValueError: a tensor has another size or dtype.
    """

    def __init__(
        self,
        matrix: TernaryMatrix | LaidOut,
        x: Any,
        out: Any,
        scratch: Any,
        threads: int,
        *,
        bias: Any = None,
        mode: Mode = "int8-group",
    ) -> None:
        (O, I), tokens, number = matrix.shape, len(x), MODES[mode]
        for name, tensor, shape in (("x", x, (tokens, I)), ("out", out, (tokens, O))):
            good = str(tensor.dtype).removeprefix("torch.") == "float32" and _is_contiguous(tensor)
            if not good or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be contiguous float32 {list(shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        wanted, at = scratch_bytes(matrix, tokens, threads, mode), _address(scratch)
        if scratch.nbytes < wanted or at % 64:
            raise ValueError(
                f"scratch must hold {wanted} bytes on a cache line, got {scratch.nbytes} at "
                f"{at % 64} past one"
            )
        kernels, shape = matrix._kernels, matrix._shape
        prepared, work = _sizes(matrix, tokens, mode)
        self._most, self._kept = tokens, (matrix, x, out, scratch, bias)
        self._prepare = PrepareArgs(shape, _address(x), 0, I, _FLOAT32, number, at)
        self._multiply = MultiplyArgs(
            shape, _address(matrix.data), at, 0, O, _FLOAT32, number, _address(out),
            None if bias is None else _address(bias), at + prepared, work,
        )  # fmt: skip
        self.steps: list[tuple[int, ctypes.Structure]] = [
            (kernels.prepare.address.value, self._prepare),
            (kernels.multiply.address.value, self._multiply),
        ]

    def set_tokens(self, tokens: int) -> None:
        """How many rows of x the next runs have, 0 <= tokens <= most_tokens."""
        if not 0 <= tokens <= self._most:
            raise ValueError(f"tokens must be in 0..{self._most}, got {tokens}")
        self._prepare.tokens = self._multiply.tokens = tokens


def scratch_bytes(matrix: TernaryMatrix | LaidOut, tokens: int, threads: int, mode: Mode) -> int:
    """Bytes of scratch memory for products of up to `tokens` rows on up to `threads` threads."""
    prepared, work = _sizes(matrix, tokens, mode)
    return prepared + threads * work


def _sizes(matrix: TernaryMatrix | LaidOut, tokens: int, mode: Mode) -> tuple[int, int]:
    """Bytes of activations, and of work a thread, for any number of rows up to `tokens`: a few
    tokens go another way than many, which may take more.
    """
    sizes = [
        matrix._kernels.sizes(matrix._shape, few, MODES[mode])
        for few in (*range(1, min(tokens, 16)), tokens)
    ]
    return max(prepared for prepared, _ in sizes), max(work for _, work in sizes)


def _address(values: Any) -> int:
    return values.ctypes.data if isinstance(values, np.ndarray) else values.data_ptr()


def _is_contiguous(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.flags.c_contiguous
    return values.is_contiguous()

"""A ternary product as operations for somebody else's threads: an engine that goes through a list.

`TernaryMatrix.multiply` allocates and runs on PyTorch's threads. Here the arguments are made once,
over memory that stays; only the number of tokens changes from call to call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu_library import DTYPES, MODES, MultiplyArgs, PrepareArgs
from .matrix import Mode, TernaryMatrix


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
        matrix: TernaryMatrix,
        x: Tensor,
        out: Tensor,
        scratch: Tensor,
        threads: int,
        *,
        bias: Tensor | None = None,
        mode: Mode = "int8-group",
    ) -> None:
        (O, I), tokens, number = matrix.shape, len(x), MODES[mode]
        for name, tensor, shape in (("x", x, (tokens, I)), ("out", out, (tokens, O))):
            good = tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not good or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be contiguous float32 {list(shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        wanted = scratch_bytes(matrix, tokens, threads, mode)
        if scratch.nbytes < wanted or scratch.data_ptr() % 64:
            raise ValueError(
                f"scratch must hold {wanted} bytes on a cache line, got {scratch.nbytes} at "
                f"{scratch.data_ptr() % 64} past one"
            )
        kernels, shape, at = matrix._kernels, matrix._shape, scratch.data_ptr()
        prepared, work = _sizes(matrix, tokens, mode)
        self._most, self._kept = tokens, (matrix, x, out, scratch, bias)
        self._prepare = PrepareArgs(shape, x.data_ptr(), 0, I, DTYPES[x.dtype], number, at)
        self._multiply = MultiplyArgs(
            shape, matrix.data.data_ptr(), at, 0, O, DTYPES[out.dtype], number, out.data_ptr(),
            None if bias is None else bias.data_ptr(), at + prepared, work,
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


def scratch_bytes(matrix: TernaryMatrix, tokens: int, threads: int, mode: Mode) -> int:
    """Bytes of scratch memory for products of up to `tokens` rows on up to `threads` threads."""
    prepared, work = _sizes(matrix, tokens, mode)
    return prepared + threads * work


def _sizes(matrix: TernaryMatrix, tokens: int, mode: Mode) -> tuple[int, int]:
    """Bytes of activations, and of work a thread, for any number of rows up to `tokens`: a few
    tokens go another way than many, which may take more.
    """
    sizes = [
        matrix._kernels.sizes(matrix._shape, few, MODES[mode])
        for few in (*range(1, min(tokens, 16)), tokens)
    ]
    return max(prepared for prepared, _ in sizes), max(work for _, work in sizes)

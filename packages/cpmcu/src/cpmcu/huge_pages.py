"""Memory in 2 MB pages, where the system has them: reading it once per token costs fewer look-ups.

Where the system gives none, the memory is ordinary. What it was worth is in `docs/log.md`.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

PAGE = 1 << 21


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Like `torch.empty`, on a 64-byte boundary; small tensors are ordinary memory."""
    size = prod(shape) * dtype.itemsize
    if size < PAGE:
        return torch.empty(*shape, dtype=dtype)
    return _mapped(size).view(dtype)[: prod(shape)].view(shape)


def _mapped(size: int) -> Tensor:
    """uint8 [size, rounded up to whole pages], given back with the last tensor that lies in it."""
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return torch.frombuffer(memory, dtype=torch.uint8)


class Arena:
    """Tensors of any size one behind the other in such memory, taken in pieces of `piece` bytes or
    of as many as a tensor needs.
    """

    def __init__(self, piece: int = 32 << 20) -> None:
        self._size, self._piece, self._at = piece, torch.empty(0, dtype=torch.uint8), 0

    def empty(self, size: int) -> Tensor:
        """uint8 [size] on a 64-byte boundary."""
        if self._at + size > len(self._piece):
            self._piece, self._at = _mapped(max(size, self._size)), 0
        taken = self._piece[self._at : self._at + size]
        self._at += -(-size // 64) * 64
        return taken

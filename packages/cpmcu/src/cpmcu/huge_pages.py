"""Memory in 2 MB pages, where the system has them: reading it once per token costs fewer look-ups.

Where the system gives none, the memory is ordinary. What it was worth is in `docs/log.md`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from math import prod
from typing import Any

import numpy as np

PAGE = 1 << 21


def empty(*shape: int, dtype: Any) -> np.ndarray:
    """Like `numpy.empty`, on a 64-byte boundary; small arrays are ordinary memory."""
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = aligned(size) if size < PAGE else _mapped(size)[:size]
    return memory.view(dtype).reshape(shape)


def aligned(size: int) -> np.ndarray:
    """uint8 [size] of ordinary memory on a 64-byte boundary."""
    memory = np.empty(size + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    return memory[skip : skip + size]


def _mapped(size: int) -> np.ndarray:
    """uint8 [size, rounded up to whole pages], given back with the last array that lies in it."""
    size = -(-size // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    # Private: systems give large pages to shared memory more rarely. What lies before and after the
    # large pages is never touched.
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    whole = np.frombuffer(memory, np.uint8)
    skip = -whole.ctypes.data % PAGE
    return whole[skip : skip + size]


class Arena:
    """Arrays of any size one behind the other in such memory, taken in pieces of `piece` bytes or
    of as many as an array needs.
    """

    def __init__(self, piece: int = 32 << 20) -> None:
        self._size, self._piece, self._at = piece, np.empty(0, np.uint8), 0

    def empty(self, size: int) -> np.ndarray:
        """uint8 [size] on a 64-byte boundary."""
        if self._at + size > len(self._piece):
            self._piece, self._at = _mapped(max(size, self._size)), 0
        taken = self._piece[self._at : self._at + size]
        self._at += -(-size // 64) * 64
        return taken


def give_back() -> None:
    """Let the C library return freed memory to the system, where it can be asked to: loading leaves
    tens of megabytes of gaps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)

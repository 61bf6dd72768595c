"""The number of keys of a launch: a number, or a place in GPU memory where it stands.

With the second a launch is the same however many keys there are, so that a CUDA graph of it stays
right as a sequence grows; grids and scratch are then sized for the most keys there may be.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def length_of(S):
    """S itself, or what it points to, int32."""
    if S.dtype.is_ptr():
        return tl.load(S).to(tl.int32)
    else:
        return S

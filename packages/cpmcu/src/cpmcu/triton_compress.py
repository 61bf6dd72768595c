"""Compressed keys of InfLLM v2 as they are completed, one token at a time, on a GPU.

Most tokens complete none: the kernel looks at the position in GPU memory and returns. Sums run in
`infllm2.compression`'s order, so the bits are those that compressing a whole prompt gives.
Letters: K key-value heads, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cpmcu.sparse import COARSE_FACTOR, SparseAttention


@triton.jit
def compress_kernel(
    k, fine, coarse, position, k_head, fine_head, coarse_head,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, FACTOR: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (head, 0) looks after the fine kernels, (head, 1) after the coarse ones."""
    head, level = tl.program_id(0).to(tl.int64), tl.program_id(1)
    factor = tl.where(level == 0, 1, FACTOR)
    past = tl.load(position).to(tl.int32) + 1 - factor * SIZE
    d = tl.arange(0, DIM)
    if (past >= 0) & (past % (factor * STRIDE) == 0):
        k += head * k_head + past.to(tl.int64) * D
        total = tl.zeros((DIM,), tl.float32)
        for window in range(0, SIZE // STRIDE):
            sums = tl.zeros((DIM,), tl.float32)
            for part in range(0, factor):
                some = tl.zeros((DIM,), tl.float32)
                for i in range(0, STRIDE):
                    row = (window * factor + part) * STRIDE + i
                    some += tl.load(k + row * D + d, mask=d < D, other=0.0).to(tl.float32)
                sums += some
            total += sums
        mean = total / (factor * SIZE)
        j = past // (factor * STRIDE)
        if level == 0:
            to = fine + head * fine_head
        else:
            to = coarse + head * coarse_head
        tl.store(to + j.to(tl.int64) * D + d, mean.to(fine.dtype.element_ty), mask=d < D)


def compress(
    k: Tensor, fine: Tensor, coarse: Tensor, position: Tensor, sizes: SparseAttention
) -> None:
    """Write the kernels that end with the key at `position`, if any do.

    Args:
        k: [K, S, D], each head contiguous.
        fine: [K, room, D], the same way.
        coarse: likewise.
        position: integer [1] on the same device.
        sizes: of the kernels.
    """
    K, _, D = k.shape
    compress_kernel[(K, 2)](
        k, fine, coarse, position, k.stride(0), fine.stride(0), coarse.stride(0),
        SIZE=sizes.kernel_size, STRIDE=sizes.kernel_stride, FACTOR=COARSE_FACTOR, D=D,
        DIM=triton.next_power_of_2(D),
    )  # fmt: skip

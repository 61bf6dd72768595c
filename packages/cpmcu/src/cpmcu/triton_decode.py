"""Dense attention of one token on a GPU, over as many keys as a number in GPU memory says.

That number is read by the kernel, so the launch is the same for every length, and a CUDA graph of
it stays right as the sequence grows. The keys of each key-value head are shared among programs
(split-KV), each leaves a normalised sum and its log-sum-exp in float32, and a second launch weighs
the parts in order. Programs beyond the sequence do nothing.

Tested in Triton's interpreter and compiled for sm80 and sm90; no GPU was at hand to time the sizes.
Letters: H query heads, K key-value heads, G = H / K, D head dimension, S keys that there is room
for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # programs that a launch should have
TILE = 64  # keys of a step
EVERYTHING = 1 << 30  # the window of a model that has none
STAGES = 3


@triton.jit
def part_kernel(
    q, k, v, position, parts, part_lse, k_head, v_head, window, scale,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, GP: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, H, D] and part_lse [SPLITS, H] (base 2) of keys first … position."""
    head, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(position).to(tl.int32) + 1
    first = tl.maximum(length - window, 0)
    share = (length - first + SPLITS * N - 1) // (SPLITS * N) * N
    begin = tl.minimum(first + split * share, length)
    stop = tl.minimum(begin + share, length)
    g, d, column = tl.arange(0, GP), tl.arange(0, DIM), tl.arange(0, N)
    real = (g < G)[:, None] & (d < D)[None, :]
    q_tile = tl.load(q + (head * G + g)[:, None] * D + d[None, :], mask=real, other=0.0)
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    sums = tl.zeros((GP, DIM), tl.float32)
    for at in range(begin, stop, N):
        key = at + column
        row = key.to(tl.int64) * D
        keys = tl.load(
            k + row[None, :] + d[:, None], mask=(key < stop)[None, :] & (d < D)[:, None], other=0.0
        )
        logits = tl.dot(q_tile, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        logits = tl.where((key < stop)[None, :], logits, float("-inf"))
        now = tl.maximum(top, tl.max(logits, 1))
        # What is not finite shifts by 0, and then spoils the sum of its own row.
        shift = tl.where(tl.abs(now) < float("inf"), now, 0.0)
        shrink = tl.exp2(top - shift)
        weights = tl.exp2(logits - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            v + row[:, None] + d[None, :], mask=(key < stop)[:, None] & (d < D)[None, :], other=0.0
        )
        sums = sums * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        top = now
    result = tl.where((total == 0.0)[:, None], 0.0, sums / total[:, None])
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    row = split * (tl.num_programs(0) * G) + head * G + g
    tl.store(parts + row[:, None] * D + d[None, :], result, mask=real)
    tl.store(part_lse + row, shift + tl.log2(total), mask=g < G)


@triton.jit
def merge_kernel(parts, part_lse, out, H, D: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """out [H, D]: the parts, weighed by their sums."""
    head = tl.program_id(0)
    d, row = tl.arange(0, DIM), tl.arange(0, SPLITS) * H + head
    lse = tl.load(part_lse + row)
    top = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(tl.abs(top) < float("inf"), top, 0.0))
    values = tl.load(parts + row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    result = tl.sum(values * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + head * D + d, result.to(out.dtype.element_ty), mask=d < D)


def splits(heads: int, capacity: int) -> int:
    """Programs for each key-value head: a power of two, and no more than there are tiles."""
    wanted = -(-PROGRAMS // heads)
    tiles = max(1, capacity // TILE)
    return min(1 << (wanted - 1).bit_length(), 1 << (tiles.bit_length() - 1))


def decode(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, *, window: int | None = None
) -> Tensor:
    """Attention of the token at `position` to the keys up to its own, itself included.

    Args:
        q: [H, D], contiguous.
        k: [K, S, D], each head contiguous; rows after `position` are not read.
        v: as k.
        position: integer [1], on the same device, below S.
        window: only this many newest keys are seen; None: all.

    Returns:
        [H, D] in q's dtype.

    Raises:
        ValueError: q, or a head of k or v, is not contiguous.
    """
    (H, D), (K, S) = q.shape, k.shape[:2]
    if not (q.is_contiguous() and k.stride()[1:] == v.stride()[1:] == (D, 1)):
        raise ValueError(
            f"q and each head of k and v must be contiguous, got strides {q.stride()}, "
            f"{k.stride()} and {v.stride()}: call .contiguous()"
        )
    count = splits(K, S if window is None else min(S, window))
    dim = max(16, triton.next_power_of_2(D))
    parts = torch.empty(count, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(count, H, dtype=torch.float32, device=q.device)
    part_kernel[(K, count)](
        q, k, v, position, parts, lse, k.stride(0), v.stride(0),
        EVERYTHING if window is None else window, D**-0.5, G=H // K, D=D, DIM=dim,
        GP=max(16, triton.next_power_of_2(H // K)), N=TILE, SPLITS=count, num_stages=STAGES,
    )  # fmt: skip
    out = torch.empty_like(q)
    merge_kernel[(H,)](parts, lse, out, H, D=D, DIM=dim, SPLITS=count)
    return out

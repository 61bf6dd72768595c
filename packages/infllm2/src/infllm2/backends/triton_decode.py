"""Attention of a few tokens in Triton: each token's list in parts, merged by log-sum-exp.

In decoding there are too few (token, key-value head) pairs to fill a GPU, so several programs walk
one list (split-KV). Each leaves a normalised output and its log-sum-exp in float32; the merge
weighs the parts, in a fixed order, so the result does not vary from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm2.backends import triton_forward, triton_lists
from infllm2.backends.triton_launch import Tiles
from infllm2.backends.triton_length import length_of


@triton.jit(do_not_specialize=["T", "S", "n", "heads"])
def merge_parts_kernel(
    parts, part_lse, blocks, out, lse, T, S, n, heads,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, B·H, T, D] and part_lse [SPLITS, B·H, T] (base 2) → out, lse (base e)."""
    S = length_of(S)
    token, head = tl.program_id(0) % T, tl.program_id(0) // T
    d = tl.arange(0, DIM)
    part = tl.arange(0, SPLITS)
    at = (part * heads + head).to(tl.int64) * T + token
    weight = tl.load(part_lse + at)
    top = tl.max(weight, 0)
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    share = tl.exp2(weight - top)
    total = tl.sum(share, 0)
    values = tl.load(parts + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    result = tl.sum(values * share[:, None], 0) / total
    # The lists ascend, so the first entry tells whether the token sees any key at all.
    block = tl.load(blocks + ((head // G).to(tl.int64) * T + token) * n)
    result = tl.where((block >= 0) & (block <= (S - T + token) // BLOCK), result, 0.0)
    to = head.to(tl.int64) * T + token
    tl.store(out + to * D + d, result, mask=d < D)
    tl.store(lse + to, (top + tl.log2(total)) * 0.6931471805599453)


def decode(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    *, block_size: int, scale: float, tiles: Tiles, splits: int, keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, H, T, D]` and log-sum-exp `[B, H, T]`, by `splits` programs for each token.

    Args:
        q: `[B, H, T, D]`, any strides, as k and v.
        k: `[B, K, S, D]`.
        v: as k.
        blocks: contiguous int32 `[B·K, T, n]`.
        block_size: keys per block.
        scale: factor on the logits.
        tiles: sizes, of one token.
        splits: a power of two, at least 2.
        keys: integer [1] on the GPU: how many keys there are, the rest is room; T = 1. None: S.
    """
    B, H, T, D = q.shape
    parts = torch.empty(splits, B, H, T, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, B, H, T, dtype=torch.float32, device=q.device)
    S, n = k.shape[2], blocks.shape[2]
    lists = triton_lists.merged(blocks, S, block_size, 1, 0, T)
    triton_forward.launch(
        q, k, v, lists, parts, part_lse,
        block_size=block_size, scale=scale, tiles=tiles, splits=splits, keys=keys,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    merge_parts_kernel[(T * B * H,)](
        parts, part_lse, blocks, out, lse, T, S if keys is None else keys, n, B * H,
        G=H // k.shape[1], D=D, DIM=tiles.dim, SPLITS=splits, BLOCK=block_size,
        num_warps=4 if splits * tiles.dim <= 1 << 13 else 8,
    )  # fmt: skip
    return out, lse

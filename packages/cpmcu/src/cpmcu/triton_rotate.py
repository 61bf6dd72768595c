"""Queries, keys and values on their way from a product to attention, in one launch on a GPU.

Queries and keys are normalised (where the model does that) and rotated; keys and values go to
their places in the cache. Where that is, is read on the GPU, so the launch of one token is the same
at every position. Arithmetic is float32, rounded once.

Tested in Triton's interpreter and compiled for sm80 and sm90. Letters: T tokens, H query heads,
K key-value heads, D head dimension, S positions that the cache has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of a program


@triton.jit
def rotate_kernel(
    qkv, q_norm, k_norm, cos, sin, position, q, arena, T, S, eps,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Program (i, head): one head of M tokens, as two halves. Heads are queries, keys, values."""
    head = tl.program_id(1)
    t, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, DIM)
    mask = (t < T)[:, None] & (d < HALF)[None, :]
    D: tl.constexpr = 2 * HALF
    at = qkv + t.to(tl.int64)[:, None] * ((H + 2 * K) * D) + head * D + d[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    place = tl.load(position).to(tl.int64) + t
    is_query, is_value = head < H, head >= H + K
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)
        of_q, of_k = (d < HALF) & is_query, (d < HALF) & (head >= H) & (head < H + K)
        wa = tl.load(q_norm + d, mask=of_q, other=0.0).to(tl.float32)
        wb = tl.load(q_norm + HALF + d, mask=of_q, other=0.0).to(tl.float32)
        wa += tl.load(k_norm + d, mask=of_k, other=0.0).to(tl.float32)
        wb += tl.load(k_norm + HALF + d, mask=of_k, other=0.0).to(tl.float32)
        a = tl.where(is_value, a, a * scale[:, None] * wa[None, :])
        b = tl.where(is_value, b, b * scale[:, None] * wb[None, :])
    # Both halves of the cosines are the same; the sines' second half is the one with the sign of +.
    angle = place[:, None] * D + d[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    first = tl.where(is_value, a, a * c - b * s)
    second = tl.where(is_value, b, b * c + a * s)
    if is_query:
        to = q + (t.to(tl.int64)[:, None] * H + head) * D + d[None, :]
    else:  # values lie K heads after keys here and in the cache
        to = arena + ((head - H).to(tl.int64) * S + place[:, None]) * D + d[None, :]
    tl.store(to, first.to(q.dtype.element_ty), mask=mask)
    tl.store(to + HALF, second.to(q.dtype.element_ty), mask=mask)


def rotate(
    qkv: Tensor, norms: tuple[Tensor | None, Tensor | None], tables: tuple[Tensor, Tensor],
    position: Tensor, arena: Tensor, heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """Rotated queries [T, H, D]; keys and values are written to `arena`.

    Args:
        qkv: [T, (H + 2 K) D], contiguous.
        norms: weights [D] of the norms of queries and of keys, or None.
        tables: cosines and signed sines of positions 0, 1, ... [at least S, 1, D], as `RopeTable`
            has them.
        position: integer [1] on the GPU, that of the first token.
        arena: [2, K, S, D], contiguous, in the dtype of qkv.
        heads: H.
        eps: of the norms.

    Raises:
        ValueError: qkv or arena is not contiguous, or their dtypes differ.
    """
    T, (_, K, S, D) = len(qkv), arena.shape
    if not (qkv.is_contiguous() and arena.is_contiguous() and arena.dtype == qkv.dtype):
        raise ValueError(
            "qkv and arena must be contiguous and of one dtype, got strides "
            f"{qkv.stride()} and {arena.stride()}, {qkv.dtype} and {arena.dtype}: call "
            ".contiguous() and .to(dtype)"
        )
    q = torch.empty(T, heads, D, dtype=qkv.dtype, device=qkv.device)
    tokens = min(TOKENS, triton.next_power_of_2(T))
    rotate_kernel[(triton.cdiv(T, tokens), heads + 2 * K)](
        qkv, *norms, *tables, position, q, arena, T, S, eps, H=heads, K=K, HALF=D // 2,
        DIM=triton.next_power_of_2(D // 2), NORM=norms[0] is not None, M=tokens,
        num_warps=1 if tokens == 1 else 4,
    )  # fmt: skip
    return q

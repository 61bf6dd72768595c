"""InfLLM v2 in plain PyTorch: every stage of the paper as it is written down, for any shape.

Slow and memory-hungry on purpose (scores of all queries against all kernels, attention by a dense
mask); every other backend is tested against it. Sections are those of arXiv 2509.24663.

Letters: B batch, H query heads, K key-value heads, G = H / K heads per group, T queries, S keys,
J kernels, N blocks, n visited blocks per query, D head size. The queries are the last T of S
positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm2.config import COARSE_FACTOR, InfLLMv2Config


def compress(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Average keys over overlapping kernels (section 3.1): out[j] = mean(k[j·stride : j·stride +
    size]).

    Only complete kernels count, and the mean is rounded to k's dtype, as a cache stores it: k
    `[..., S, D]` → `[..., max(0, (S − size) // stride + 1), D]`.
    """
    if k.shape[-2] < kernel_size:
        return k[..., :0, :]
    return k.to(working_dtype(k)).unfold(-2, kernel_size, kernel_stride).mean(-1).to(k.dtype)


def kernel_scores(
    q: Tensor, fine: Tensor, coarse: Tensor, S: int, config: InfLLMv2Config
) -> Tensor:
    """Relevance of each fine kernel to each query, summed over the heads of a group (section 3.2,
    3.3).

    S(t, j) = Σ_h exp(q_h·C1[j]/√D − lse_h(t)) over kernels that end at or before t. `lse` runs over
    the coarse kernels ("approx") or the fine ones ("exact"). Where no coarse kernel is complete
    yet, the approximation has no terms and the exact sum takes its place. Scores that are not
    numbers (keys with NaN or ±inf) count as 0, infinite ones as the largest finite number.

    Args:
        q: `[B, H, T, D]`, the last T of S positions.
        fine: C1 = compress(k, l, s), `[B, K, J, D]`.
        coarse: C2 = compress(k, 4 l, 4 s).
        S: number of keys.
        config: sizes.

    Returns:
        `[B, K, T, J]`, float32 or float64; 0 where the kernel is not complete at t.
    """
    size, stride = config.kernel_size, config.kernel_stride
    logits = _logits(q, fine, S, size, stride)
    lse = logits.logsumexp(-1, keepdim=True)
    if config.lse == "approx":
        approximate = _logits(q, coarse, S, COARSE_FACTOR * size, COARSE_FACTOR * stride)
        approximate = approximate.logsumexp(-1, keepdim=True)
        lse = torch.where(approximate == -math.inf, lse, approximate)
    # A query that sees no kernel at all has lse = −inf, and exp(−inf + inf) is not a number: 0, as
    # defined.
    scores = (logits - lse).exp().sum(2)
    return scores.nan_to_num(nan=0.0, posinf=torch.finfo(scores.dtype).max)


def block_scores(q: Tensor, fine: Tensor, coarse: Tensor, S: int, config: InfLLMv2Config) -> Tensor:
    """Score of each block: the largest score of the kernels that touch it (section 3.2).

    Block m holds tokens m·B … m·B + B − 1, touched by kernels m·r − (l/s − 1) … m·r + r − 1 with r
    = B/s. Arguments as `kernel_scores`.

    Returns:
        `[B, K, T, N]`, N = ⌈S / block_size⌉: +inf for forced blocks (initial, window), −inf for
        blocks after the query's own.
    """
    scores = kernel_scores(q, fine, coarse, S, config)
    T = q.shape[2]
    N = -(-S // config.block_size)
    per_block = config.block_size // config.kernel_stride
    overlap = config.kernel_size // config.kernel_stride - 1
    # 0 is the least a kernel can score, so padding with it changes no maximum.
    padded = torch.nn.functional.pad(scores, (overlap, max(0, N * per_block - scores.shape[-1])))
    if N:
        pooled = padded.unfold(-1, per_block + overlap, per_block)[..., :N, :].amax(-1)
    else:
        pooled = padded[..., :0]

    own = query_positions(T, S, q.device)[:, None] // config.block_size
    block = torch.arange(N, device=q.device)
    forced = (block < config.init_blocks) | (own - block < config.window_blocks)
    return pooled.masked_fill(forced, math.inf).masked_fill(block > own, -math.inf)


@torch.no_grad()
def select_blocks(
    q: Tensor, fine: Tensor, coarse: Tensor, S: int, config: InfLLMv2Config
) -> Tensor:
    """The blocks each query visits: the `config.budget` best-scored, ties to the lower index.

    Arguments as `kernel_scores`.

    Returns:
        int32 `[B, K, T, config.budget]`, ascending, then −1.
    """
    scores = block_scores(q, fine, coarse, S, config)
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    index = index.masked_fill(best == -math.inf, scores.shape[-1])[..., : config.budget]
    index = torch.nn.functional.pad(
        index, (0, config.budget - index.shape[-1]), value=scores.shape[-1]
    )
    index = index.sort(dim=-1).values
    return index.masked_fill(index == scores.shape[-1], -1).int()


def visible_mask(blocks: Tensor, T: int, S: int, block_size: int) -> Tensor:
    """Which keys each query attends to: bool `[B, K, T, S]`, visited blocks cut by causality."""
    N = -(-S // block_size)
    # One spare column takes the −1 entries.
    slots = torch.where(blocks < 0, N, blocks).long()
    visited = torch.zeros(*blocks.shape[:3], N + 1, dtype=torch.bool, device=blocks.device)
    visited = visited.scatter(-1, slots, True)[..., :N]
    keys = torch.arange(S, device=blocks.device)
    causal = keys <= query_positions(T, S, blocks.device)[:, None]
    return visited[..., keys // block_size] & causal


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visited blocks (section 3.2), by masking dense scores.

    Returns:
        The output `[B, H, T, D]` in q's dtype, and the log-sum-exp `[B, H, T]` in the working
        dtype. A query without any visible key gets 0 and −inf.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    dtype = working_dtype(q)
    visible = visible_mask(blocks, T, S, block_size)[:, :, None]
    logits = torch.einsum("bkgtd,bksd->bkgts", q.to(dtype).unflatten(1, (K, -1)), k.to(dtype))
    logits = (logits * scale).masked_fill(~visible, -math.inf)
    lse = logits.logsumexp(-1)
    empty = ~visible.any(-1)
    weights = (logits - lse.masked_fill(empty, 0)[..., None]).exp()
    out = torch.einsum("bkgts,bksd->bkgtd", weights, v.to(dtype))
    return out.reshape(B, H, T, D).to(q.dtype), lse.reshape(B, H, T)


def query_positions(T: int, S: int, device: torch.device) -> Tensor:
    """Absolute positions of the queries: int64 `[T]`, S − T … S − 1."""
    return torch.arange(S - T, S, device=device)


def working_dtype(x: Tensor) -> torch.dtype:
    """Float32 for every dtype but float64, which stays."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logits(q: Tensor, kernels: Tensor, S: int, size: int, stride: int) -> Tensor:
    """Scaled query·kernel products, −inf for incomplete kernels: [B, K, G, T, J]."""
    dtype = working_dtype(q)
    groups = q.to(dtype).unflatten(1, (kernels.shape[1], -1))
    logits = torch.einsum("bkgtd,bkjd->bkgtj", groups, kernels.to(dtype)) / math.sqrt(q.shape[-1])
    last = torch.arange(kernels.shape[-2], device=q.device) * stride + size - 1
    return logits.masked_fill(last > query_positions(q.shape[2], S, q.device)[:, None], -math.inf)

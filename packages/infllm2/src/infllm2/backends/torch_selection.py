"""Block selection by tiles of queries: scores of one tile at a time, never of all queries at once.

A tile lies within one block, so its queries share their own block, their window and their candidates, and
nothing is masked but the last few kernels. Scores are kept with kernels along rows and queries along
columns: adding heads and taking the maximum over the kernels of a block then run over contiguous memory.
Kernels inside the window are never scored: their blocks are visited anyway.

Letters as in `infllm2.reference`; M = B·K, R = queries of a tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm2.config import COARSE_FACTOR, InfLLMv2Config
from infllm2.reference import working_dtype

# Bytes of scores that one tile may hold; tiles become shorter where a block of queries needs more.
TILE_BYTES = 32 << 20


def select(q: Tensor, k: Tensor, config: InfLLMv2Config) -> Tensor:
    """The blocks each query visits, as `infllm2.reference.select_blocks` defines them."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    dtype = working_dtype(q)
    out = torch.full((B * K, T, config.budget), -1, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out.view(B, K, T, config.budget)
    q_MGTD = (q.to(dtype) / math.sqrt(D)).reshape(B * K, H // K, T, D)
    # While every block fits into the budget there is nothing to score, and often no key to compress.
    scored_from = max(S - T, config.budget * config.block_size)
    fine, coarse = _compress(k.to(dtype).reshape(B * K, S, D), config, needed=scored_from < S)

    row_bytes = max(1, fine.shape[1] * q_MGTD.shape[0] * q_MGTD.shape[1] * q_MGTD.element_size())
    rows = max(1, min(config.block_size, TILE_BYTES // row_bytes))
    start = S - T
    while start < S:
        own = start // config.block_size
        if own < config.budget:
            stop = min(S, config.budget * config.block_size)
            _all_blocks(out[:, start - S + T : stop - S + T], start, config.block_size)
        else:
            stop = min(S, start + rows, (own + 1) * config.block_size)
            tile = slice(start - S + T, stop - S + T)
            out[:, tile] = _select_tile(q_MGTD[:, :, tile], fine, coarse, start, config)
        start = stop
    return out.view(B, K, T, config.budget)


def _all_blocks(out_MRn: Tensor, start: int, block_size: int) -> None:
    """Write blocks 0 … own of queries that can visit them all."""
    R, n = out_MRn.shape[1:]
    own = torch.arange(start, start + R, device=out_MRn.device)[:, None] // block_size
    block = torch.arange(n, device=out_MRn.device)
    out_MRn.copy_(torch.where(block <= own, block, -1))


def _compress(k_MSD: Tensor, config: InfLLMv2Config, *, needed: bool) -> tuple[Tensor, Tensor]:
    """Fine and coarse compressed keys from sums over strides, so that each key is read once."""
    stride = config.kernel_stride
    M, S, D = k_MSD.shape
    steps = S // stride if needed else 0
    sums = k_MSD[:, : steps * stride].view(M, steps, stride, D).sum(2)
    fine = _windows(sums, config.kernel_size // stride) / config.kernel_size
    if config.lse == "exact":
        return fine, fine
    sums = sums[:, : steps // COARSE_FACTOR * COARSE_FACTOR]
    sums = sums.view(M, steps // COARSE_FACTOR, COARSE_FACTOR, D).sum(2)
    coarse = _windows(sums, config.kernel_size // stride) / (COARSE_FACTOR * config.kernel_size)
    return fine, coarse


def _windows(sums_MJD: Tensor, width: int) -> Tensor:
    """Sums over `width` neighbours; fewer than `width` give none."""
    count = max(0, sums_MJD.shape[1] - width + 1)
    total = sums_MJD[:, :count].clone()
    for offset in range(1, width):
        total += sums_MJD[:, offset : offset + count]
    return total


def _select_tile(
    q_MGRD: Tensor, fine: Tensor, coarse: Tensor, start: int, config: InfLLMv2Config
) -> Tensor:
    """Blocks of queries start … start + R − 1, all in one block and past the budget: [M, R, n]."""
    M, G, R, D = q_MGRD.shape
    window = config.window_blocks
    candidates = start // config.block_size - window + 1
    per_block = config.block_size // config.kernel_stride
    q_MDC = q_MGRD.reshape(M, G * R, D).transpose(1, 2)

    lse = _lse(q_MDC, fine, coarse, start, R, config)
    kernels = fine[:, : candidates * per_block]
    scores = torch.baddbmm(lse.neg_(), kernels, q_MDC)
    _mask_incomplete(scores, start, R, config.kernel_size, config.kernel_stride)
    scores = scores.exp_().view(M, -1, G, R).sum(2)
    scores.nan_to_num_(nan=0.0, posinf=torch.finfo(scores.dtype).max)

    overlap = config.kernel_size // config.kernel_stride - 1
    pooled = _pool(scores, candidates, per_block, overlap)
    pooled[:, : config.init_blocks] = math.inf
    chosen = _top_indices(pooled.transpose(1, 2).contiguous(), config.topk)
    local = torch.arange(candidates, candidates + window, device=chosen.device)
    return torch.cat([chosen, local.expand(M, R, window)], -1).int()


def _lse(
    q_MDC: Tensor, fine: Tensor, coarse: Tensor, start: int, R: int, config: InfLLMv2Config
) -> Tensor:
    """Log-sum-exp over the complete kernels of each query of the tile: [M, 1, G·R]."""
    size, stride = config.kernel_size, config.kernel_stride
    exact = config.lse == "exact"
    if not exact:
        size, stride = COARSE_FACTOR * size, COARSE_FACTOR * stride
    kernels = coarse[:, : _complete(start + R - 1, size, stride)]
    logits = torch.bmm(kernels, q_MDC)
    _mask_incomplete(logits, start, R, size, stride)
    lse = logits.logsumexp(1, keepdim=True)
    if exact or _complete(start, size, stride) > 0:
        return lse
    # Some query of the tile sees no coarse kernel: those take the exact sum.
    size, stride = config.kernel_size, config.kernel_stride
    logits = torch.bmm(fine[:, : _complete(start + R - 1, size, stride)], q_MDC)
    _mask_incomplete(logits, start, R, size, stride)
    return torch.where(lse == -math.inf, logits.logsumexp(1, keepdim=True), lse)


def _complete(position: int, size: int, stride: int) -> int:
    """Number of kernels that end at or before a position."""
    return max(0, (position + 1 - size) // stride + 1)


def _mask_incomplete(logits_MJC: Tensor, start: int, R: int, size: int, stride: int) -> None:
    """Set to −inf, in place, the kernels that end after the query; only the last few can."""
    first = _complete(start, size, stride)
    if first >= logits_MJC.shape[1]:
        return
    device = logits_MJC.device
    last_token = torch.arange(first, logits_MJC.shape[1], device=device) * stride + size - 1
    late = last_token[:, None] > torch.arange(start, start + R, device=device)
    tail = logits_MJC[:, first:]
    tail.view(*tail.shape[:2], -1, R).masked_fill_(late[:, None], -math.inf)


def _pool(scores_MJR: Tensor, candidates: int, per_block: int, overlap: int) -> Tensor:
    """Largest score of the kernels that touch each candidate block: [M, candidates, R]."""
    M, J, R = scores_MJR.shape
    if J < candidates * per_block:
        # Kernels not complete yet score 0, the least there is.
        missing = scores_MJR.new_zeros(M, candidates * per_block - J, R)
        scores_MJR = torch.cat([scores_MJR, missing], 1)
    pooled = scores_MJR.view(M, candidates, per_block, R).amax(2)
    for back in range(1, overlap + 1):
        # Kernel m·per_block − back starts before block m and reaches into it.
        skip = -(-back // per_block)
        earlier = scores_MJR[:, skip * per_block - back :: per_block][:, : candidates - skip]
        torch.maximum(pooled[:, skip:], earlier, out=pooled[:, skip:])
    return pooled


def _top_indices(scores_MRN: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending, ties to the lower index: int64 [M, R, count]."""
    values, index = scores_MRN.topk(count, dim=-1, sorted=False)
    least = values.amin(-1, keepdim=True)
    if torch.count_nonzero(scores_MRN >= least) == index.numel():
        return index.sort(-1).values
    # `topk` breaks ties as it likes, so wherever the last place is shared we sort, stably.
    tied = (scores_MRN >= least).sum(-1) != count
    order = scores_MRN[tied].sort(dim=-1, descending=True, stable=True).indices
    index[tied] = order[..., :count]
    return index.sort(-1).values

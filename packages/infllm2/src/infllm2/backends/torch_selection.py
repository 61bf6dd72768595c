"""Block selection by tiles of queries: scores of one tile at a time, never of all queries at once.

A tile lies within one block, so its queries share their own block, their window and their
candidates, and nothing is masked but the last few kernels. Scores are kept with kernels along rows
and queries along columns: adding heads and taking the maximum over the kernels of a block then run
over contiguous memory. Kernels inside the window are never scored: their blocks are visited anyway.

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
# Blocks of queries whose best blocks are picked in one go.
STRIP_BLOCKS = 16


def select(q: Tensor, fine: Tensor, coarse: Tensor, S: int, config: InfLLMv2Config) -> Tensor:
    """The blocks each query visits, as `infllm2.reference.select_blocks` defines them."""
    B, H, T, D = q.shape
    K = fine.shape[1]
    dtype = working_dtype(q)
    out = torch.full((B * K, T, config.budget), -1, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out.view(B, K, T, config.budget)
    q_MGTD = (q.to(dtype) / math.sqrt(D)).reshape(B * K, H // K, T, D)
    fine, coarse = (x.to(dtype).flatten(0, 1) for x in (fine, coarse))
    start = S - T
    while start < S:
        own = start // config.block_size
        if own < config.budget:
            stop = min(S, config.budget * config.block_size)
            _all_blocks(out[:, start - S + T : stop - S + T], start, config.block_size)
        else:
            stop = min(S, (own + STRIP_BLOCKS) * config.block_size)
            strip = slice(start - S + T, stop - S + T)
            out[:, strip] = _select_strip(q_MGTD[:, :, strip], fine, coarse, start, config)
        start = stop
    return out.view(B, K, T, config.budget)


def _all_blocks(out_MRn: Tensor, start: int, block_size: int) -> None:
    """Write blocks 0 … own of queries that can visit them all."""
    R, n = out_MRn.shape[1:]
    own = torch.arange(start, start + R, device=out_MRn.device)[:, None] // block_size
    block = torch.arange(n, device=out_MRn.device)
    out_MRn.copy_(torch.where(block <= own, block, -1))


def _select_strip(
    q_MGTD: Tensor, fine: Tensor, coarse: Tensor, start: int, config: InfLLMv2Config
) -> Tensor:
    """Blocks of queries start … start + T − 1, all past the budget: [M, T, n].

    Scores come tile by tile, the choice for the whole strip at once: it is many small operations.
    """
    M, G, T, D = q_MGTD.shape
    last_own = (start + T - 1) // config.block_size
    scores = q_MGTD.new_full((M, T, last_own - config.window_blocks + 1), -math.inf)
    row_bytes = max(1, fine.shape[1] * M * G * q_MGTD.element_size())
    rows = max(1, min(config.block_size, TILE_BYTES // row_bytes))
    first = start
    while first < start + T:
        own = first // config.block_size
        stop = min(start + T, first + rows, (own + 1) * config.block_size)
        tile = slice(first - start, stop - start)
        tile_scores = _score_tile(q_MGTD[:, :, tile], fine, coarse, first, config)
        scores[:, tile, : tile_scores.shape[1]] = tile_scores.transpose(1, 2)
        first = stop
    chosen = _top_indices(scores, config.topk)
    own_T = torch.arange(start, start + T, device=chosen.device) // config.block_size
    back = torch.arange(1 - config.window_blocks, 1, device=chosen.device)
    local = (own_T[:, None] + back).expand(M, T, -1)
    return torch.cat([chosen, local], -1).int()


def _score_tile(
    q_MGRD: Tensor, fine: Tensor, coarse: Tensor, start: int, config: InfLLMv2Config
) -> Tensor:
    """Scores of the blocks before the window, for queries of one block: [M, candidates, R]."""
    M, G, R, D = q_MGRD.shape
    candidates = start // config.block_size - config.window_blocks + 1
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
    return pooled


def _lse(
    q_MDC: Tensor, fine: Tensor, coarse: Tensor, start: int, R: int, config: InfLLMv2Config
) -> Tensor:
    """Log-sum-exp over the complete kernels of each query of the tile: [M, 1, G·R]."""
    size, stride = config.kernel_size, config.kernel_stride
    exact = config.lse == "exact"
    if not exact:
        size, stride = COARSE_FACTOR * size, COARSE_FACTOR * stride
    kernels = (fine if exact else coarse)[:, : _complete(start + R - 1, size, stride)]
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
        earlier = scores_MJR[:, skip * per_block - back :: per_block][
            :, : max(0, candidates - skip)
        ]
        torch.maximum(pooled[:, skip:], earlier, out=pooled[:, skip:])
    return pooled


def _top_indices(scores_MRN: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending, ties to the lower index: int64 [M, R, count]."""
    values, index = scores_MRN.topk(count, dim=-1, sorted=False)
    candidates = scores_MRN >= values.amin(-1, keepdim=True)
    if torch.count_nonzero(candidates) == index.numel():
        # Nobody shares the last place: the set is unique, and `nonzero` lists it in order.
        return candidates.flatten(0, 1).nonzero()[:, 1].view_as(index)
    # `topk` breaks ties as it likes, so wherever the last place is shared we sort, stably.
    tied = candidates.sum(-1) != count
    order = scores_MRN[tied].sort(dim=-1, descending=True, stable=True).indices
    index[tied] = order[..., :count]
    return index.sort(-1).values

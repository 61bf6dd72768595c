"""Block selection as the released CUDA kernels do it, for comparison with models that run on them.

Three things differ from the definition in `InfLLMv2Config`:

- The causal frontier is anchored at the end of the call by integer division. Query i of T sees
  ⌊(i + 1) / s⌋ + J − trunc((T − (s − 1)) / s) of J kernels with stride s, on both levels: mostly
  one kernel that is not complete yet, and one fewer where T = s − 1 modulo s, so a token's blocks
  depend on how its prompt was chunked.
- The window is forced one block further back: W + 1 blocks, of the same budget.
- Where no coarse kernel is visible the scores are 0; there is no exact sum in its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm2.config import COARSE_FACTOR, InfLLMv2Config
from infllm2.reference import query_positions, working_dtype

# Scores of all heads of one tile of queries, at most: this is plain PyTorch, not a fast path.
TILE_BYTES = 64 << 20


def visible_kernels(T: int, J: int, stride: int, device: torch.device) -> Tensor:
    """How many of J kernels each of T queries sees: int64 `[T]`, 0 … J."""
    behind = math.trunc((T - (stride - 1)) / stride)
    seen = (torch.arange(T, device=device) + 1) // stride + J - behind
    return seen.clamp(0, J)


def official_blocks(
    q: Tensor, fine: Tensor, coarse: Tensor, length: int, config: InfLLMv2Config
) -> Tensor:
    """Blocks each query visits: int32 `[B, K, T, budget]`, ascending, −1 padded, ties to the lower.

    Arguments as `infllm2.reference.select_blocks`.
    """
    B, H, T, _ = q.shape
    K, J = fine.shape[1], fine.shape[2]
    own = query_positions(T, length, q.device) // config.block_size
    levels = []
    for kernels, factor in ((fine, 1), (coarse, COARSE_FACTOR)):
        stride = factor * config.kernel_stride
        levels.append((kernels, visible_kernels(T, kernels.shape[2], stride, q.device)))
    if config.lse == "exact":
        levels[1] = levels[0]
    out = torch.full((B, K, T, config.budget), -1, dtype=torch.int32, device=q.device)
    step = max(1, TILE_BYTES // max(1, 4 * B * H * J))
    for first in range(0, T, step):
        part = slice(first, min(T, first + step))
        logits, normaliser = (
            _logits(q[:, :, part], kernels, seen[part]) for kernels, seen in levels
        )
        scores = (logits - normaliser.logsumexp(-1, keepdim=True)).exp().nan_to_num(nan=0.0).sum(2)
        out[:, :, part] = _best(_pooled(scores, length, config), own[part], config)
    return out


def _logits(q: Tensor, kernels: Tensor, seen: Tensor) -> Tensor:
    """[B, K, G, T, J] products, −inf beyond the frontier."""
    dtype = working_dtype(q)
    groups = q.to(dtype).unflatten(1, (kernels.shape[1], -1))
    logits = torch.einsum("bkgtd,bkjd->bkgtj", groups, kernels.to(dtype)) / math.sqrt(q.shape[-1])
    index = torch.arange(kernels.shape[2], device=q.device)
    return logits.masked_fill(index >= seen[:, None], -math.inf)


def _pooled(scores: Tensor, length: int, config: InfLLMv2Config) -> Tensor:
    """Largest score among kernels r·m − 1 … r·m + r − 1 of block m (the kernels' fixed window)."""
    per_block = config.block_size // config.kernel_stride
    N = -(-length // config.block_size)
    missing = max(0, N * per_block - scores.shape[-1])
    padded = torch.nn.functional.pad(scores, (1, missing))
    return padded.unfold(-1, per_block + 1, per_block)[..., :N, :].amax(-1)


def _best(pooled: Tensor, own: Tensor, config: InfLLMv2Config) -> Tensor:
    N, budget = pooled.shape[-1], config.budget
    block = torch.arange(N, device=pooled.device)
    back = own[:, None] - block
    forced = (block < config.init_blocks) | ((back >= 0) & (back <= config.window_blocks))
    scores = pooled.masked_fill(forced, math.inf).masked_fill(back < 0, -math.inf)
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    index = index.masked_fill(best == -math.inf, N)[..., :budget]
    index = torch.nn.functional.pad(index, (0, budget - index.shape[-1]), value=N).sort(-1).values
    return index.masked_fill(index == N, -1).int()

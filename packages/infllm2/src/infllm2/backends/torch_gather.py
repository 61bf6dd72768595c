"""Attention of a few queries (decode): gather each query's visited blocks, then attend to them.

Letters as in `infllm2.reference`; L = tokens gathered per query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm2.reference import query_positions, working_dtype


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, T, D]` and log-sum-exp `[B, H, T]`; differentiable through the gathers."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    dtype = working_dtype(q)
    # Rows shorter than the budget end in −1: the longest row says how much there is to gather.
    widest = int((blocks >= 0).sum(-1).amax()) if blocks.numel() else 0
    blocks = blocks[..., :widest].long()
    offsets = torch.arange(block_size, device=q.device)
    tokens = (blocks[..., None] * block_size + offsets).flatten(-2)  # [B, K, T, L]
    hidden = (tokens < 0) | (tokens > query_positions(T, S, q.device)[:, None])
    tokens = tokens.clamp_(0, max(0, S - 1))

    batch = torch.arange(B, device=q.device).view(B, 1, 1, 1)
    head = torch.arange(K, device=q.device).view(1, K, 1, 1)
    keys = k[batch, head, tokens].to(dtype)  # [B, K, T, L, D]
    values = v[batch, head, tokens].to(dtype)
    q_BKTGD = (q.to(dtype) * scale).unflatten(1, (K, H // K)).transpose(2, 3)
    logits = (q_BKTGD @ keys.mT).masked_fill(hidden[..., None, :], -math.inf)
    lse = logits.logsumexp(-1)
    empty = lse == -math.inf
    weights = (logits - lse.masked_fill(empty, 0)[..., None]).exp()
    out = weights @ values
    return (
        out.transpose(2, 3).reshape(B, H, T, D).to(q.dtype),
        lse.transpose(2, 3).reshape(B, H, T),
    )

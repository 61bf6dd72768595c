"""Attention to the blocks that all queries of a block share: those just before them, and their own.

Queries of one block with a common window of W blocks form a dense problem [G·B × W·B]; over all
query blocks these are strided views of the keys, so PyTorch's fused attention takes them in one
batch without a copy. Queries at the start, which visit every block, are plain causal attention.

Letters as in `infllm2.reference`; M = B·K, R = queries of a run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shared_blocks(blocks_MTn: Tensor, start: int, block_size: int) -> tuple[int, int]:
    """What the sets have in common.

    Returns:
        `dense`: leading queries of the strip that visit all blocks up to their own;
        `window`: blocks, own one included, that every query after those visits (0: not even its
        own). A window longer than a query's past counts as its whole past.
    """
    M, T, n = blocks_MTn.shape
    if n == 0:
        return 0, 0
    device = blocks_MTn.device
    own = torch.arange(start, start + T, device=device, dtype=blocks_MTn.dtype) // block_size
    count = (blocks_MTn >= 0).sum(-1, keepdim=True)
    # In an ascending row that ends in `own`, entry i lies at least (count − 1 − i) before it, and
    # exactly so along the unbroken run that ends the row.
    behind = count - 1 - torch.arange(n, device=device)
    unbroken = (own[:, None] - blocks_MTn == behind) & (behind >= 0)
    ends_in_own = blocks_MTn.gather(-1, (count - 1).clamp_(min=0)).squeeze(-1) == own
    run = unbroken.sum(-1) * ends_in_own
    run_T = run.amin(0)
    short = (run_T <= own).nonzero()
    if short.numel() == 0:
        return T, 0
    dense = int(short[0])
    beyond = run_T[dense:]
    whole = beyond > own[dense:]
    return dense, int(beyond.masked_fill(whole, n).amin())


def attend(
    q_MTGD: Tensor,
    k_MSD: Tensor,
    v_MSD: Tensor,
    start: int,
    block_size: int,
    dense: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Attention to the shared blocks: output [M, T, G, D] and log-sum-exp [M, T, G].

    Queries (already scaled) sit at positions start …; the first `dense` see their whole past, the
    others their last `window` blocks. With `window` 0 those get output 0 and log-sum-exp −inf.
    """
    M, T, G, D = q_MTGD.shape
    out = torch.zeros_like(q_MTGD)
    lse = q_MTGD.new_full((M, T, G), -math.inf)

    def run(first: int, last: int, low: int) -> None:
        """Queries first … last − 1 of the strip, causal, against the keys from `low` on."""
        keys = slice(low, start + last)
        o, m = _causal(q_MTGD[:, first:last], k_MSD[:, keys], v_MSD[:, keys])
        out[:, first:last], lse[:, first:last] = o, m

    if dense:
        run(0, dense, 0)
    if window == 0:
        return out, lse
    # Partial blocks at either end go alone, and so do blocks whose window would start before key 0.
    at = dense
    while at < T:
        own = (start + at) // block_size
        end = min(T, (own + 1) * block_size - start)
        whole = (T - at) // block_size
        if (start + at) % block_size == 0 and own >= window - 1 and whole:
            end = at + whole * block_size
            o, m = _windows(q_MTGD[:, at:end], k_MSD, v_MSD, own, block_size, window)
            out[:, at:end], lse[:, at:end] = o, m
        else:
            run(at, end, max(0, own - window + 1) * block_size)
        at = end
    return out, lse


def _windows(
    q_MTGD: Tensor, k_MSD: Tensor, v_MSD: Tensor, own: int, block_size: int, window: int
) -> tuple[Tensor, Tensor]:
    """Whole blocks of queries, the first in block `own`, each against its last `window` blocks."""
    M, T, G, D = q_MTGD.shape
    count, length = T // block_size, window * block_size
    low = (own - window + 1) * block_size
    shape = (M, count, length, D)

    def view(x: Tensor) -> Tensor:
        strides = (x.stride(0), block_size * D, D, 1)
        return x.as_strided(shape, strides, x.storage_offset() + low * D)

    queries = q_MTGD.reshape(M, count, block_size * G, D)
    device = q_MTGD.device
    row = torch.arange(block_size * G, device=device)[:, None] // G + (length - block_size)
    late = torch.arange(length, device=device) > row
    mask = torch.zeros(late.shape, dtype=q_MTGD.dtype, device=device).masked_fill_(late, -math.inf)
    out, lse = _fused(queries, view(k_MSD), view(v_MSD), mask, False)
    return out.reshape(M, T, G, D), lse.reshape(M, T, G)


def _causal(q_MRGD: Tensor, k_MLD: Tensor, v_MLD: Tensor) -> tuple[Tensor, Tensor]:
    """The last R of L positions, causal."""
    M, R, G, D = q_MRGD.shape
    L = k_MLD.shape[1]
    queries = q_MRGD.transpose(1, 2)
    keys, values = (x[:, None].expand(M, G, L, D) for x in (k_MLD, v_MLD))
    if R == L:
        out, lse = _fused(queries, keys, values, None, True)
    else:
        late = torch.ones(R, L, dtype=torch.bool, device=queries.device).triu_(L - R + 1)
        mask = torch.zeros(R, L, dtype=queries.dtype, device=queries.device)
        out, lse = _fused(queries, keys, values, mask.masked_fill_(late, -math.inf), False)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries with its log-sum-exp, which PyTorch's public call keeps back."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=1.0
        )
    logits = q @ k.mT
    if causal:
        late = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        logits.masked_fill_(late, -math.inf)
    elif mask is not None:
        logits += mask
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp_() @ v, lse

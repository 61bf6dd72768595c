"""Attention to scattered blocks, block by block: every query that visits a block meets it at once.

Walking through blocks instead of queries makes large matrix products out of scattered choices and
computes exactly the chosen (query, block) pairs; a tile of queries would have to compute the union
of its queries' choices, about twice as many on real text.

Letters as in `infllm2.reference`; M = B·K, R = queries that visit one block, B block size inside
shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond this sum of weights (relative to the local part) float32 products could overflow.
LARGEST_SUM = 1e30


@dataclass(frozen=True)
class Pairs:
    """(query, block) pairs of each key-value head, sorted by block, then query.

    Attributes:
        rows: per head, int64 `[pairs]`, query rows of the strip.
        counts: per head, number of pairs of each block.
    """

    rows: list[Tensor]
    counts: list[list[int]]

    def of(self, head: int) -> Iterator[tuple[int, Tensor]]:
        """Every visited block of a head with the rows that visit it, ascending."""
        at = 0
        for block, count in enumerate(self.counts[head]):
            if count:
                yield block, self.rows[head][at : at + count]
            at += count


def pairs(blocks_MTn: Tensor, start: int, block_size: int, *, skip_nearest: int = 0) -> Pairs:
    """List the visited pairs, less the `skip_nearest` blocks that end in the query's own."""
    M, T, n = blocks_MTn.shape
    device = blocks_MTn.device
    own = (
        torch.arange(start, start + T, device=device, dtype=blocks_MTn.dtype)[:, None] // block_size
    )
    wanted = (blocks_MTn >= 0) & (blocks_MTn <= own - skip_nearest)
    rows, counts = [], []
    for head in range(M):
        row, slot = wanted[head].nonzero(as_tuple=True)
        block = blocks_MTn[head, row, slot]
        rows.append(row[block.argsort(stable=True)])
        counts.append(torch.bincount(block).tolist())
    return Pairs(rows, counts)


def forward(
    q_MTGD: Tensor,
    k_MSD: Tensor,
    v_MSD: Tensor,
    todo: Pairs,
    out_MTGD: Tensor,
    lse_MTG: Tensor,
    block_size: int,
    start: int,
) -> None:
    """Add the listed pairs to a partial attention (`out`, `lse`), in place. Queries are scaled."""
    for head in range(q_MTGD.shape[0]):
        arguments = (q_MTGD[head], k_MSD[head], v_MSD[head], list(todo.of(head)), block_size)
        result = _accumulate(*arguments, out_MTGD[head], lse_MTG[head])
        if result is None:
            result = _accumulate_online(*arguments, out_MTGD[head], lse_MTG[head], start)
        out_MTGD[head], lse_MTG[head] = result


def _accumulate(
    q_TGD: Tensor,
    k_SD: Tensor,
    v_SD: Tensor,
    visits: list[tuple[int, Tensor]],
    block_size: int,
    out_TGD: Tensor,
    lse_TG: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Weights relative to the local part's log-sum-exp, which needs no running maximum.

    Its sum is 1 by construction, so nothing underflows to 0/0; `None` where the scattered part
    outweighs it so far (or is not finite) that the sums are not to be trusted, or where there is no
    local part.
    """
    if (lse_TG == -math.inf).any():
        return None
    T, G, D = q_TGD.shape
    total = torch.ones_like(lse_TG)
    sums = out_TGD.reshape(T, G * D).clone()
    queries = q_TGD.reshape(T, G * D)
    shift = -lse_TG
    for block, rows in visits:
        keys = slice(block * block_size, (block + 1) * block_size)
        chosen = queries.index_select(0, rows).view(-1, D)
        base = shift.index_select(0, rows).view(-1, 1)
        weights = torch.addmm(base, chosen, k_SD[keys].T).exp_()
        sums.index_add_(0, rows, (weights @ v_SD[keys]).view(-1, G * D))
        total.index_add_(0, rows, weights.sum(-1).view(-1, G))
    if not bool((total < LARGEST_SUM).all()):
        return None
    return sums.view(T, G, D) / total[..., None], lse_TG + total.log()


def _accumulate_online(
    q_TGD: Tensor,
    k_SD: Tensor,
    v_SD: Tensor,
    visits: list[tuple[int, Tensor]],
    block_size: int,
    out_TGD: Tensor,
    lse_TG: Tensor,
    start: int,
) -> tuple[Tensor, Tensor]:
    """The same with a running maximum: any logits, no local part needed."""
    T, G, D = q_TGD.shape
    absent = lse_TG == -math.inf
    top = lse_TG.clamp(min=torch.finfo(lse_TG.dtype).min)
    total = torch.ones_like(lse_TG).masked_fill_(absent, 0)
    sums = out_TGD.masked_fill(absent[..., None], 0)
    for block, rows in visits:
        keys = slice(block * block_size, (block + 1) * block_size)
        logits = (q_TGD[rows].view(-1, D) @ k_SD[keys].T).view(len(rows), G, -1)
        _mask_own(logits, rows, start, block, block_size)
        old = top[rows]
        new = torch.maximum(old, logits.amax(-1))
        weights = (logits - new[..., None]).exp_()
        shrink = (old - new).exp_()
        top[rows] = new
        total[rows] = total[rows] * shrink + weights.sum(-1)
        added = (weights.view(-1, weights.shape[-1]) @ v_SD[keys]).view(-1, G, D)
        sums[rows] = sums[rows] * shrink[..., None] + added
    empty = total == 0
    out = sums / total.masked_fill(empty, 1)[..., None]
    return out, (top + total.log()).masked_fill(empty, -math.inf)


def backward(
    q_MTGD: Tensor,
    k_MSD: Tensor,
    v_MSD: Tensor,
    todo: Pairs,
    lse_MTG: Tensor,
    grad_MTGD: Tensor,
    delta_MTG: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    block_size: int,
    start: int,
) -> None:
    """Add the gradients of scaled queries, keys and values over the listed pairs to `grads`."""
    M, T, G, D = q_MTGD.shape
    for head in range(M):
        dq, dk, dv = (x[head] for x in grads)
        for block, rows in todo.of(head):
            keys = slice(block * block_size, (block + 1) * block_size)
            k_BD, v_BD = k_MSD[head, keys], v_MSD[head, keys]
            queries = q_MTGD[head, rows].view(-1, D)
            grad = grad_MTGD[head, rows].view(-1, D)
            logits = (queries @ k_BD.T).view(len(rows), G, -1)
            _mask_own(logits, rows, start, block, block_size)
            weights = (logits - lse_MTG[head, rows][..., None]).exp_().view(-1, k_BD.shape[0])
            dv[keys] += weights.T @ grad
            slope = (grad @ v_BD.T).sub_(delta_MTG[head, rows].view(-1, 1)).mul_(weights)
            dk[keys] += slope.T @ queries
            dq.index_add_(0, rows, (slope @ k_BD).view(-1, G, D))


def _mask_own(logits_RGB: Tensor, rows: Tensor, start: int, block: int, block_size: int) -> None:
    """Hide later keys from the queries that lie in the block itself: the first rows, if any."""
    inside = rows[:block_size] + start - block * block_size
    inside = inside[inside < block_size]
    if len(inside):
        late = torch.arange(logits_RGB.shape[-1], device=rows.device) > inside[:, None]
        logits_RGB[: len(inside)].masked_fill_(late[:, None], -math.inf)

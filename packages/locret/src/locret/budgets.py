"""Who gets how many entries where budgets are not all alike: Ada-KV's rule, with both ends stated.

Lanes (the heads of a layer, or the layers) share lanes · budget entries. All entries of all lanes
are put in one order, and the first so many stay (arXiv 2407.11550, §4.1); a lane never has fewer
than a floor or more than a ceiling. So a head that looks at little gives room to one that looks at
much, and the sum is what uniform budgets hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.config import LocretConfig


def shared_limits(worth: Tensor, counts: Tensor, config: LocretConfig) -> Tensor:
    """Entries that each lane keeps.

    Args:
        worth: `[B, lanes, n]`, each lane's entries from its best to its worst, comparable between
            lanes; what lies beyond a lane's count is not looked at.
        counts: int64 `[B, lanes]`, entries that each lane has.
        config: budget, floor and ceiling.

    Returns:
        int64 `[B, lanes]`; the sum is lanes · budget, or all there is.
    """
    lanes, n = worth.shape[1:]
    rank = torch.arange(n, device=worth.device)
    value = worth.float().masked_fill(rank < config.floor, torch.inf)
    allowed = counts.clamp(max=config.ceiling)
    value = value.masked_fill(rank >= allowed[..., None], -torch.inf)
    total = allowed.sum(-1, keepdim=True).clamp(max=lanes * config.budget)
    # Equal entries of equal rank go to all lanes in turn, not all to the first.
    order = value.transpose(1, 2).flatten(1).sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(lanes * n, device=worth.device) < total
    chosen = torch.zeros_like(first.expand(len(worth), -1)).scatter(1, order, first)
    return chosen.unflatten(1, (n, lanes)).sum(1)

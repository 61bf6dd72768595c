"""Which entries of a cache stay: `reference.evict` for all rows and heads of a layer at once."""

from __future__ import annotations

import torch
from torch import Tensor

from locret.config import LocretConfig


def keep(
    scores: Tensor, positions: Tensor, valid: Tensor | None, last: Tensor | None,
    config: LocretConfig, due: Tensor | None = None, limit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The best entries of each row and head, in their old order.

    Args:
        scores: `[B, J, n]`, oldest entry first.
        positions: int `[B, J, n]`, where in its text each entry stands.
        valid: bool `[B, J, n]`, False where a head holds nothing, which goes first; None if all do.
        last: bool `[B]`, rows whose text has ended: there the newest entries are not protected;
            None if no row's has.
        config: sizes.
        due: bool `[B]`, rows that are cut; the others keep all. None: all rows are.
        limit: int64 `[B, J]`, entries that each keeps; None: the budget.

    Returns:
        int64 indices `[B, J, m]`, ascending, a head's entries before what is none; and the new
        `valid` `[B, J, m]`, None where all are entries.

    Raises:
        ValueError: NaN scores, which would order at random.
    """
    b, j, n = scores.shape
    counts = torch.full((b, j), n, device=scores.device) if valid is None else valid.sum(-1)
    limit = counts.clamp(max=config.budget) if limit is None else torch.minimum(limit, counts)
    if due is not None:
        limit = torch.where(due[:, None], limit, counts)
    m = int(limit.max())
    best = ranked(scores, positions, valid, last, config)[..., :m]
    left = torch.arange(m, device=scores.device) < limit[..., None]
    if bool(left.all()):
        return best.sort(-1).values, None
    best = (best + ~left * n).sort(-1).values % n
    return best, left


def ranked(
    scores: Tensor, positions: Tensor, valid: Tensor | None, last: Tensor | None,
    config: LocretConfig,
) -> Tensor:  # fmt: skip
    """int64 `[B, J, n]`: entries from the one that goes last to the one that goes first.

    The protected come before all, of equal scores the older; arguments as in `keep`.
    """
    if torch.isnan(scores).any():
        raise ValueError("a score is NaN: the scorer or the model overflowed")
    n = scores.shape[-1]
    worth = scores.float().clone()
    if config.stabilisers:
        newest = n - torch.arange(n, device=scores.device).expand_as(scores)
        if valid is not None:
            newest = valid.sum(-1, keepdim=True) - valid.cumsum(-1) + 1
        protected = newest <= config.stabilisers
        if last is not None:
            protected = protected & ~last[:, None, None]
        worth.masked_fill_(protected, torch.inf)
    if config.sinks:
        worth.masked_fill_(positions < config.sinks, torch.inf)
    if valid is not None:
        worth.masked_fill_(~valid, -torch.inf)
    return torch.sort(worth, dim=-1, descending=True, stable=True).indices

"""Which entries of a cache stay: `reference.evict` for all rows and heads of a layer at once."""

from __future__ import annotations

import torch
from torch import Tensor

from locret.config import LocretConfig


def keep(
    scores: Tensor, positions: Tensor, valid: Tensor | None, last: Tensor | None,
    config: LocretConfig, due: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The `budget` best entries of each row and head, in their old order.

    Args:
        scores: `[B, J, n]`, oldest entry first.
        positions: int `[B, J, n]`, where in its text each entry stands.
        valid: bool `[B, n]`, False for padding, which goes first; None if all are.
        last: bool `[B]`, rows whose text has ended: there the newest entries are not protected;
            None if no row's has.
        config: sizes.
        due: bool `[B]`, rows that are cut; the others keep all. None: all rows are.

    Returns:
        int64 indices `[B, J, m]`, ascending, a row's real entries before its padding; and the new
        `valid` `[B, m]`, None where nothing is padding.

    Raises:
        ValueError: NaN scores, which would order at random.
    """
    if torch.isnan(scores).any():
        raise ValueError("a score is NaN: the scorer or the model overflowed")
    b, _, n = scores.shape
    counts = torch.full((b,), n, device=scores.device) if valid is None else valid.sum(1)
    limit = counts.clamp(max=config.budget)
    if due is not None:
        limit = torch.where(due, limit, counts)
    m = int(limit.max())
    places = torch.arange(n, device=scores.device)
    worth = scores.float().clone()
    if config.stabilisers:
        newest = (
            (n - places)[None].expand(b, n)
            if valid is None
            else counts[:, None] - valid.cumsum(1) + 1
        )
        protected = newest <= config.stabilisers
        if last is not None:
            protected = protected & ~last[:, None]
        worth.masked_fill_(protected[:, None], torch.inf)
    if config.sinks:
        worth.masked_fill_(positions < config.sinks, torch.inf)
    if valid is not None:
        worth.masked_fill_(~valid[:, None], -torch.inf)
    best = torch.sort(worth, dim=-1, descending=True, stable=True).indices[..., :m]
    left = torch.arange(m, device=scores.device) < limit[:, None]
    if bool(left.all()):
        return best.sort(-1).values, None
    padding = ~left[:, None]
    best = (best + padding * n).sort(-1).values % n
    return best, left

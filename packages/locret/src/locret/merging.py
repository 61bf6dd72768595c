"""What is evicted leaves its value with the kept entry whose key is most like its own.

Two entries of one key weigh exp(q·k)(v₁ + v₂) in an attention's sum, which is one entry with the
mean of their values and a weight of two. So of an evicted entry and the kept one nearest to it the
mean of values stays, by their masses, and the masses add up; attention adds log mass to the kept
key's score. Where keys are equal this changes nothing; where they are only alike it is an
approximation, and `merge` says how alike they must be. Idea: CaM (ICML 2024), D2O (2406.13035);
the mass is ToMe's proportional attention (2210.09461).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def merged(
    keys: Tensor, values: Tensor, masses: Tensor, index: Tensor, left: Tensor | None,
    valid: Tensor | None, least: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Values and masses of what stays, after what goes was merged into it.

    Args:
        keys: `[B, J, n, D]`, as attention sees them.
        values: `[B, J, n, D']`.
        masses: float `[B, J, n]`, entries that each stands for.
        index: int64 `[B, J, m]`, what stays.
        left: bool `[B, J, m]`, False where `index` points at nothing; None: nowhere.
        valid: bool `[B, J, n]`, False for padding; None: there is none.
        least: cosine of two keys from which on one may stand for the other.

    Returns:
        values `[B, J, m, D']`; masses `[B, J, m]`; bool `[B, J, m]`, which of them changed.
    """
    stays = torch.ones_like(index, dtype=torch.bool) if left is None else left
    kept = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    kept.scatter_(2, index, stays)
    goes = ~kept if valid is None else ~kept & valid
    # All heads look at as many columns: the evicted first, the rest of no mass.
    most = int(goes.sum(-1).max())
    gone = goes.long().sort(dim=-1, descending=True, stable=True).indices[..., :most]
    unit = normalize(keys.float(), dim=-1)
    rows = lambda x, at: x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))  # noqa: E731
    alike = rows(unit, gone) @ rows(unit, index).transpose(2, 3)
    alike = alike.masked_fill(~stays[:, :, None], -torch.inf)
    best, target = alike.max(-1)
    weight = masses.gather(2, gone) * (goes.gather(2, gone) & (best >= least))
    old = masses.gather(2, index)
    new = old.scatter_add(2, target, weight)
    summed = rows(values, index).float() * old[..., None]
    wide = target[..., None].expand(-1, -1, -1, values.shape[-1])
    summed = summed.scatter_add(2, wide, rows(values, gone).float() * weight[..., None])
    return (summed / new[..., None]).to(values.dtype), new, new != old

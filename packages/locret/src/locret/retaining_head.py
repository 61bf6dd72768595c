"""The retaining head: from a token's query, key and value to what its cache entry is worth. §3.1.

R(x) = σ(x W₁) W₂ with x = [Q, K, V] before RoPE, all heads; no biases; one score for each key-value
head. It reads frozen activations, so each layer trains on its own and the model never changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMOOTHING = 0.0025  # weight of the neighbour term, as released


class RetainingHead(nn.Module):
    """One layer's head.

    Args:
        heads: query heads.
        kv_heads: key-value heads; divides `heads`.
        head_dim: width of a head.
        hidden: width of the head's own hidden layer, d_R (paper: 1024).

    Raises:
        ValueError: a size below one, or heads that do not divide.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, hidden: int = 1024) -> None:
        super().__init__()
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "hidden": hidden}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if heads % kv_heads:
            raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
        # The released checkpoints call the two matrices fc1 and fc2.
        self.fc1 = nn.Linear((heads + 2 * kv_heads) * head_dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, kv_heads, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores `[B, Hkv, T]` from q `[B, Hq, T, D]` and k, v `[B, Hkv, T, D]`, before RoPE."""
        x = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=-1)
        return self.fc2(F.silu(self.fc1(x))).transpose(1, 2)


def retaining_loss(scores: Tensor, labels: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """SmoothL1 to the labels, plus `smoothing` times the squared step between neighbours. Eq. 5.

    Args:
        scores: `[B, Hkv, T]`, the head's.
        labels: `[B, Hkv, T]`, from `locret.importance`.
        smoothing: neighbouring tokens should score alike, which makes eviction keep passages.
    """
    loss = F.smooth_l1_loss(scores, labels)
    if scores.shape[-1] > 1:
        loss = loss + smoothing * F.mse_loss(scores[..., :-1], scores[..., 1:])
    return loss

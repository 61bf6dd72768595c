"""The retaining head: from a token's activations to what its cache entry is worth. §3.1.

R(x) = σ(x W₁) W₂ with x = [Q, K, V] before RoPE, all heads; one score for each key-value head. It
reads frozen activations, so each layer trains on its own and the model never changes. x may also be
the attention's input, of which [Q, K, V] is a linear image, and W may be a single matrix, which a
ridge regression finds in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMOOTHING = 0.0025  # weight of the neighbour term, as released
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class RetainingHead(nn.Module):
    """One layer's head.

    Args:
        inputs: width of x: (heads + 2 · kv_heads) · head_dim for [Q, K, V].
        kv_heads: scores for each token.
        hidden: width of the head's own hidden layer, d_R (paper: 1024); 0 is a linear head.
        activation: σ, the model's own in the paper: silu, gelu or relu.
        bias: whether both matrices have one. The paper's have none; without it scores of different
            layers are less comparable.

    Raises:
        ValueError: a size out of range or an unknown activation.
    """

    def __init__(
        self, inputs: int, kv_heads: int, hidden: int = 1024, activation: str = "silu",
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, least in (
            ("inputs", inputs, 1), ("kv_heads", kv_heads, 1), ("hidden", hidden, 0)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {known}, got {activation!r}")
        self.activation = activation
        # The released checkpoints call the two matrices fc1 and fc2.
        self.fc1 = nn.Linear(inputs, hidden, bias=bias) if hidden else None
        self.fc2 = nn.Linear(hidden or inputs, kv_heads, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[B, Hkv, T]` from activations `[B, T, inputs]`."""
        if self.fc1 is not None:
            x = ACTIVATIONS[self.activation](self.fc1(x))
        return self.fc2(x).transpose(1, 2)

    @torch.no_grad()
    def start_from(self, linear: RetainingHead) -> None:
        """Become the function of a linear head, exactly: σ(z) − σ(−z) = z for all of `ACTIVATIONS`.

        Two hidden units carry each score; the others keep their random W₁ and have a W₂ of zero,
        so they learn from the first step and change nothing before it.

        Raises:
            ValueError: no room for it, or other sizes.
        """
        kv_heads = linear.fc2.out_features
        if linear.fc1 is not None or self.fc1 is None or self.fc2.out_features != kv_heads:
            raise ValueError("start_from needs a linear head of as many kv_heads, and to be an MLP")
        if self.fc1.out_features < 2 * kv_heads:
            raise ValueError(
                f"hidden must be at least {2 * kv_heads} to start from a linear head, got "
                f"{self.fc1.out_features}"
            )
        self.fc2.weight.zero_()
        for j in range(kv_heads):
            for unit, sign in ((2 * j, 1.0), (2 * j + 1, -1.0)):
                self.fc1.weight[unit] = sign * linear.fc2.weight[j]
                self.fc2.weight[j, unit] = sign
        if self.fc1.bias is not None:
            self.fc1.bias[: 2 * kv_heads] = 0
        if self.fc2.bias is not None:
            self.fc2.bias.zero_()
            if linear.fc2.bias is not None:
                self.fc2.bias.copy_(linear.fc2.bias)


def qkv_input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Q, K, V] of all heads, `[B, T, (Hq + 2 Hkv) D]`, from `[B, H, T, D]` each, before RoPE."""
    return torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=-1)


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


def top_loss(scores: Tensor, labels: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """What eviction asks for: the order within a text, and of its best entries above all.

    A cache compares entries of one text, so scores and labels are taken from their text's mean;
    and it only asks who is among the best, so an entry far below costs little wherever it is put.
    The squared error is in units of the labels' spread, weighted by σ(2z − 1) + 0.15 for a label
    z spreads above its mean. Not the paper's; `experiments` compares the two.

    Args:
        scores, labels, smoothing: as in `retaining_loss`.
    """
    wanted = labels - labels.mean(-1, keepdim=True)
    spread = wanted.std(-1, keepdim=True, correction=0).clamp(min=1e-6)
    weight = torch.sigmoid(2 * wanted / spread - 1) + 0.15
    error = (scores - scores.mean(-1, keepdim=True) - wanted) / spread
    loss = (weight * error**2).sum() / weight.sum()
    if scores.shape[-1] > 1:
        loss = loss + smoothing * F.mse_loss(scores[..., :-1], scores[..., 1:])
    return loss


LOSSES = {"paper": retaining_loss, "top": top_loss}

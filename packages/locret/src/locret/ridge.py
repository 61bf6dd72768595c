"""Heads in closed form: one pass over the text, no gradients, no cached activations.

For each layer sums of x, y, x xᵀ and x yᵀ are all that a ridge regression needs, so the text is
seen once and memory is the square of the head's input. A cache compares entries of one text only,
so inputs and labels are taken from their text's mean: what differs from text to text teaches
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locret.heads import RetainingHeads


class RidgeSums:
    """Sums of one layer: `add` any number of times, `solve` once.

    Args:
        inputs: width of x.
        kv_heads: labels for each token.
    """

    def __init__(self, inputs: int, kv_heads: int) -> None:
        self.count = 0
        self.x = torch.zeros(inputs, dtype=torch.float64)
        self.y = torch.zeros(kv_heads, dtype=torch.float64)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, kv_heads, dtype=torch.float64)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Count texts x `[B, n, inputs]` with labels `[B, J, n]`."""
        for rows, wanted in zip(x.float().cpu(), labels.float().cpu().transpose(1, 2), strict=True):
            self.count += len(rows)
            self.x += rows.sum(0)
            self.y += wanted.sum(0)
            rows = rows - rows.mean(0)
            # Products in float32, of a text's rows; sums of many in float64.
            self.xx += (rows.T @ rows).double()
            self.xy += (rows.T @ (wanted - wanted.mean(0))).double()

    def solve(self, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Weights `[J, inputs]` and intercepts `[J]`, which put the mean of all labels right.

        Args:
            strength: of the penalty, relative to each input's own variance within texts, so that
                the result does not depend on the inputs' units.

        Raises:
            ValueError: nothing was added.
        """
        if not self.count:
            raise ValueError("ridge regression has seen no token")
        mean_x, mean_y = self.x / self.count, self.y / self.count
        cov, cross = self.xx / self.count, self.xy / self.count
        scale = cov.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > 1e-9 * scale.max().clamp(min=1e-30), scale, torch.inf)
        inner = cov / scale[:, None] / scale + strength * torch.eye(len(scale), dtype=cov.dtype)
        weights = torch.linalg.solve(inner, cross / scale[:, None]) / scale[:, None]
        return weights.T.float(), (mean_y - mean_x @ weights).float()


def fill(heads: RetainingHeads, layer: int, sums: RidgeSums, strength: float) -> None:
    """Put a layer's solution into linear heads with biases."""
    head = heads.layers[layer]
    if head.fc1 is not None or head.fc2.bias is None:
        raise ValueError("ridge regression fills heads with hidden=0 and bias=True")
    weights, intercepts = sums.solve(strength)
    with torch.no_grad():
        head.fc2.weight.copy_(weights)
        head.fc2.bias.copy_(intercepts)

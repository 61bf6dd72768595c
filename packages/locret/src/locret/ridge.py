"""Heads in closed form: one pass over the text, no gradients, no cached activations.

For each layer the sums Σ x xᵀ and Σ x yᵀ are all that a ridge regression needs, so the text is seen
once and memory is the square of the head's input.
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
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.xy = torch.zeros(inputs + 1, kv_heads, dtype=torch.float64)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Count x `[B, n, inputs]` with labels `[B, J, n]`."""
        rows = x.flatten(0, 1).float().cpu()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        # Products in float32, of a few thousand rows; sums of many in float64.
        self.xx += (rows.T @ rows).double()
        self.xy += (rows.T @ labels.transpose(1, 2).flatten(0, 1).float().cpu()).double()

    def solve(self, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Weights `[J, inputs]` and intercepts `[J]`.

        Args:
            strength: of the penalty, relative to each input's own variance, so that the result
                does not depend on the inputs' units.

        Raises:
            ValueError: nothing was added.
        """
        count = float(self.xx[-1, -1])
        if not count:
            raise ValueError("ridge regression has seen no token")
        mean_x, mean_y = self.xx[-1, :-1] / count, self.xy[-1] / count
        cov = self.xx[:-1, :-1] / count - mean_x[:, None] * mean_x
        cross = self.xy[:-1] / count - mean_x[:, None] * mean_y
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

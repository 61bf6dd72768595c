"""Trained heads and KeyDiff (arXiv 2504.15364) together, for questions that are not known yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from locret.scorers import KeyDiff, Trained, entry_weights

if TYPE_CHECKING:
    from locret.layer_store import LayerStore


@dataclass
class HeadsAndKeyDiff(Trained):
    """What the heads foresee, and what stands out: a name that nothing foretells is a rare key.

    Not of the paper. Heads learn from the queries of some text which keys are looked at; a needle
    that only a later question will name is not among them, but differs from what is around it.

    Args:
        heads: trained heads.
        weight: of KeyDiff's score, when both have a spread of 1 over the entries of a head;
            finite, 0 or more.

    Raises:
        ValueError: another weight.
    """

    weight: float = 1.0
    foretells = True

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be finite and 0 or more, got {self.weight}")

    def rescore(self, layer: LayerStore) -> None:
        """z(heads) + weight · z(KeyDiff)."""
        KeyDiff.rescore(self, layer)
        layer.scores[:] = _standard(layer, layer.foretold) + self.weight * _standard(
            layer, layer.scores
        )

    def comparable(self, layer: LayerStore) -> Tensor:
        """As they are: deviations from a head's own mean."""
        return layer.scores


def _standard(layer: LayerStore, x: Tensor) -> Tensor:
    """In standard deviations from the mean of a head's entries; 0 where all are equal."""
    weight = entry_weights(layer, x[..., None])[..., 0]
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    x = x - (x * weight).sum(-1, keepdim=True) / count
    return x / ((x**2 * weight).sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)

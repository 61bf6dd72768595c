"""The group size of ternary weights, read off the weights.

In a row, two neighbouring non-zero weights of different magnitude, at columns p < q, must have a
border between two groups in (p, q]: p // g != q // g. A group size fits if it explains all such
pairs. Every divisor of the true size fits as well, so that the largest is the answer.

Letters: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arrays import fitting_sizes


@dataclass(frozen=True, slots=True)
class Fit:
    """The group sizes that fit one matrix.

    Attributes:
        columns: I.
        sizes: those in [8, I) that fit.
        row: whether one scale for a whole row fits, and so every size from I up.
    """

    columns: int
    sizes: frozenset[int]
    row: bool

    def allows(self, size: int) -> bool:
        """Whether the matrix is ternary in groups of `size` (-1: whole rows)."""
        return self.row if size == -1 or size >= self.columns else size in self.sizes

    def largest(self) -> int | None:
        """The largest size that fits, -1 for whole rows, None if none does."""
        return -1 if self.row else max(self.sizes, default=None)


def fit_sizes(w: Tensor) -> Fit:
    """All group sizes >= 8 in which `w` [O, I] is ternary."""
    columns = w.shape[1]
    # Sorted by row and column, so that neighbours in the list are neighbours in their row.
    rows, cols = (i.numpy() for i in torch.nonzero(w, as_tuple=True))
    magnitude = w.abs()[w != 0].float().numpy()
    fits, row = fitting_sizes(rows, cols, magnitude, columns)
    return Fit(columns, fits, row)


def common_size(fits: Sequence[Fit]) -> int | None:
    """The largest group size that fits all matrices (-1: whole rows); None if there is none."""
    if not fits:
        return None
    bound = [fit for fit in fits if not fit.row]
    if not bound:
        return -1
    return max((g for g in bound[0].sizes if all(fit.allows(g) for fit in fits)), default=None)

"""Huber's loss of the residuals of a form, *summed* over the observations.

Averaged, its gradient is n times smaller; with δ = 1e-3 it then falls below the tolerances of
common optimisers at the starting point, and the "fit" is the initial guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from densing.fitting.forms import Form


@dataclass(frozen=True)
class HuberObjective:
    """Σᵢ wᵢ · huber_δ(prediction - target) for S problems that share observations, not weights.

    Attributes:
        form: what predicts.
        z: features `[K, n]`. t: targets `[n]`.
        weights: `[n]` for all problems, or `[S, n]` with a row for each.
        delta: Huber's δ in units of the target; infinite for least squares.
    """

    form: Form
    z: np.ndarray
    t: np.ndarray
    weights: np.ndarray
    delta: float

    def evaluate(
        self, theta: np.ndarray, problems: np.ndarray
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """See `minimise.Objective`."""
        with np.errstate(over="ignore", invalid="ignore"):
            prediction, pullback = self.form.evaluate(theta, self.z)
            residual = prediction - self.t
            clipped = np.clip(residual, -self.delta, self.delta)
            # Inside δ: r²/2; outside: δ(|r| - δ/2). Both are clip(r)·(r - clip(r)/2).
            loss = clipped * (residual - 0.5 * clipped)
            weights = self.weights if self.weights.ndim == 1 else self.weights[problems]
            value = loss @ weights if weights.ndim == 1 else (loss * weights).sum(axis=1)
        value = np.where(np.isnan(value), np.inf, value)

        def gradient(mask: np.ndarray) -> np.ndarray:
            # The pullback is over all rows; those that were refused may have left float range.
            with np.errstate(over="ignore", invalid="ignore"):
                return pullback(clipped * weights)[mask]

        return value, gradient

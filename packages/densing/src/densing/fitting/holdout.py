"""Does a fit to the small predict the large? The only error of a scaling law that counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from densing.fitting.fit import Fit, fit, observations
from densing.fitting.forms import Form


@dataclass(frozen=True)
class HoldOut:
    """A fit to one part of the data and its errors on the other.

    Attributes:
        fit: to the part that was not held out.
        observed, predicted: `[held]`, in the output's own unit.
    """

    fit: Fit
    observed: np.ndarray
    predicted: np.ndarray

    @property
    def relative_errors(self) -> np.ndarray:
        """(predicted - observed) / observed."""
        return (self.predicted - self.observed) / self.observed

    @property
    def mean_absolute_error(self) -> float:
        """In the output's unit."""
        return float(np.abs(self.predicted - self.observed).mean())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "fit": self.fit.to_dict(),
            "observed": self.observed.tolist(),
            "predicted": self.predicted.tolist(),
            "mean_absolute_error": self.mean_absolute_error,
            "worst_relative_error": float(np.abs(self.relative_errors).max()),
        }


def hold_out(
    form: Form,
    data: Mapping[str, Any],
    held: Sequence[bool] | np.ndarray,
    **options: Any,
) -> HoldOut:
    """Fit without the observations where `held` is true, and predict these.

    Args:
        form, data, options: as for `fit`.
        held: one flag for each observation, typically the largest models.

    Raises:
        ValueError: nothing or everything is held out, or what `fit` raises.
    """
    x, y = observations(form, data)
    mask = np.asarray(held, bool)
    if mask.shape != y.shape:
        raise ValueError(f"held: expected {len(y)} flags, got {mask.shape}")
    if not mask.any() or mask.all():
        raise ValueError(f"{mask.sum()} of {len(y)} observations are held out: nothing to compare")
    columns = {name: row[~mask] for name, row in zip(form.inputs, x, strict=True)}
    found = fit(form, {**columns, form.output[0]: y[~mask]}, **options)
    return HoldOut(found, y[mask], found.predict(*x[:, mask]))

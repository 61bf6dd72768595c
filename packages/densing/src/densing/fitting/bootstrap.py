"""How far the constants would move with other observations: thousands of refits at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from densing.fitting.fit import Fit, best_starts, data_hash, observations
from densing.fitting.minimise import minimise
from densing.fitting.objective import HuberObjective

CHUNK = 250  # problems x 240 observations x 3 terms: what a core's own cache holds


@dataclass(frozen=True)
class Bootstrap:
    """Constants of every resample.

    Attributes:
        names: of the constants, the columns of `constants`.
        constants: `[resamples, P]`, those that converged.
        resamples: how many were drawn; `failed`: how many did not converge and are left out.
        unit: what was drawn: "observations" or "groups".
        rechecked: how many resamples were fitted again from the whole grid of starts, and
            `improved`: how many of these found a better optimum than the warm start. Not 0 means
            that the intervals are too narrow.
    """

    names: tuple[str, ...]
    constants: np.ndarray
    resamples: int
    failed: int
    unit: str
    rechecked: int
    improved: int

    def of(self, name: str) -> np.ndarray:
        """One constant of every resample."""
        if name not in self.names:
            raise ValueError(f"unknown constant {name!r}: expected one of {', '.join(self.names)}")
        return self.constants[:, self.names.index(name)]

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of a constant."""
        tail = (1 - level) / 2
        low, high = np.quantile(self.of(name), [tail, 1 - tail])
        return float(low), float(high)

    def standard_error(self, name: str) -> float:
        """Standard deviation over the resamples."""
        return float(self.of(name).std(ddof=1))


def resample(
    count: int, resamples: int, seed: int, groups: Sequence[Any] | None = None
) -> np.ndarray:
    """Weights `[resamples, count]`: how often each observation was drawn.

    Args:
        count: observations. resamples: how many sets to draw.
        seed: the same seed draws the same weights.
        groups: one label for each observation; whole groups are then drawn, as the models of one
            family share their training data and are not independent.
    """
    draw = np.random.default_rng(seed)
    if groups is None:
        return draw.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
    if len(groups) != count:
        raise ValueError(f"expected a group for each of {count} observations, got {len(groups)}")
    names, member = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    drawn = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    return drawn[:, member].astype(np.float64)


def bootstrap(
    fitted: Fit,
    data: Mapping[str, Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
    recheck: int = 16,
) -> Bootstrap:
    """Refit to resampled observations, each from the constants of `fitted`.

    Args:
        fitted: the fit of the same data.
        data: as given to `fit`.
        resamples: sets to draw.
        seed: of the drawing.
        groups: labels, to draw families of models instead of single ones.
        recheck: that many resamples are fitted from the whole grid as well, see `Bootstrap`.

    Raises:
        ValueError: `data` are not what `fitted` was fitted to.
    """
    x, y = observations(fitted.form, data)
    if data_hash([*fitted.form.inputs, fitted.form.output[0]], [*x, y]) != fitted.data_sha256:
        raise ValueError("these are not the data that the fit was made from (hashes differ)")
    form, z, t = fitted.form, fitted.form.features(x), fitted.form.target(y)
    weights = resample(len(y), resamples, seed, groups)
    start = fitted.theta[None]

    parts = []
    for first in range(0, resamples, CHUNK):
        part = weights[first : first + CHUNK]
        objective = HuberObjective(form, z, t, part, fitted.delta)
        parts.append(minimise(objective, np.repeat(start, len(part), axis=0)))
    theta = np.concatenate([p.theta for p in parts])
    value = np.concatenate([p.value for p in parts])
    converged = np.concatenate([p.converged for p in parts])
    rechecked = min(recheck, resamples)
    improved = 0
    for i in range(rechecked):
        starts = best_starts(form, z, t, weights[i], fitted.delta, 16)
        again = minimise(HuberObjective(form, z, t, weights[i], fitted.delta), starts)
        improved += bool(again.value.min() < value[i] * (1 - 1e-6) - 1e-18)
    return Bootstrap(
        names=tuple(form.constants),
        constants=form.to_constants(theta[converged]),
        resamples=resamples,
        failed=int((~converged).sum()),
        unit="observations" if groups is None else "groups",
        rechecked=rechecked,
        improved=improved,
    )

"""Lines through dated densities, for thousands of resamples at once.

Which line is "the trend" is a choice, and doubling times differ by a factor of two and more between
defensible ones; so all are here, under their own names. Letters: n models, B resamples. `weights`
`[B, n]` say how often each model was drawn; 0 leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PAIRS_AT_ONCE = 2_000_000  # residuals of candidate lines held in memory: 16 MB


@dataclass(frozen=True)
class Lines:
    """A line for each resample.

    Attributes:
        slope, intercept: `[B]`; NaN in both where a resample has no line (under two points).
        r_squared: `[B]` over the points the line was fitted to; NaN for a quantile.
        points: `[B, n]` bool: the models that decided it.
    """

    slope: np.ndarray
    intercept: np.ndarray
    r_squared: np.ndarray
    points: np.ndarray


Estimator = Callable[[np.ndarray, np.ndarray, np.ndarray], Lines]
"""(days `[n]`, ln ρ `[n]`, weights `[B, n]`) -> `Lines`."""


def least_squares(days: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Lines:
    """Through all models: the growth of the average, not of the best."""
    return _line(days, np.broadcast_to(y, weights.shape), weights, weights > 0)


def envelope(days: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Lines:
    """Running maximum: through every model that is denser than all released before it.

    Models of one day enter from the least dense to the densest, so each that raises the record
    counts; `envelope_by_day` counts only the densest of a day.
    """
    return _records(days, y, weights, np.lexsort((y, days)))


def envelope_by_day(days: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Lines:
    """Running maximum with one record for a day: its densest model, if that is a record."""
    return _records(days, y, weights, np.lexsort((-y, days)))


def _records(days: np.ndarray, y: np.ndarray, weights: np.ndarray, order: np.ndarray) -> Lines:
    drawn = weights[:, order] > 0
    value = np.where(drawn, y[order], -np.inf)
    best = np.maximum.accumulate(value, axis=1)
    before = np.concatenate([np.full((len(weights), 1), -np.inf), best[:, :-1]], axis=1)
    record = drawn & (value > before)
    points = np.empty_like(record)
    points[:, order] = record
    return _line(days, np.broadcast_to(y, weights.shape), points.astype(np.float64), points)


def stepped(days: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Lines:
    """The best so far at *every* release date, also those that brought no record."""
    order = np.lexsort((y, days))
    drawn = weights[:, order] > 0
    best = np.maximum.accumulate(np.where(drawn, y[order], -np.inf), axis=1)
    # Of each day the last drawn model carries the day's best; the others would count it again.
    sorted_days = days[order]
    last = np.zeros_like(drawn)
    later_today = np.zeros(len(weights), bool)
    for i in range(len(order) - 1, -1, -1):
        if i + 1 == len(order) or sorted_days[i] != sorted_days[i + 1]:
            later_today[:] = False
        last[:, i] = drawn[:, i] & ~later_today
        later_today |= drawn[:, i]
    found = _line(sorted_days, np.where(last, best, 0.0), last.astype(np.float64), last)
    points = np.empty_like(last)
    points[:, order] = last
    return Lines(found.slope, found.intercept, found.r_squared, points)


def quantile(level: float) -> Estimator:
    """Quantile regression (Koenker & Bassett 1978): `level` of the models lie below the line.

    The optimum is a line through two of the models (a vertex of the linear programme), so all pairs
    are tried: exact, and one matrix product serves all resamples.

    Args:
        level: in (0, 1); 0.95 is a robust cousin of the envelope.
    """
    if not 0 < level < 1:
        raise ValueError(f"quantile level must lie in (0, 1), got {level}")

    def estimate(days: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Lines:
        first, second = np.triu_indices(len(days), 1)
        differ = days[first] != days[second]
        first, second = first[differ], second[differ]
        count = len(weights)
        cost, which = np.full(count, np.inf), np.zeros(count, int)
        rows = max(1, PAIRS_AT_ONCE // max(1, len(days)))
        slopes = (y[second] - y[first]) / (days[second] - days[first])
        intercepts = y[first] - slopes * days[first]
        for i in range(0, len(slopes), rows):
            part = slice(i, i + rows)
            residual = y - slopes[part, None] * days - intercepts[part, None]
            pinball = np.maximum(level * residual, (level - 1) * residual)
            costs = pinball @ weights.T
            # A line through models that were not drawn is no vertex of that resample, but not
            # better than the best vertex either.
            best = costs.argmin(axis=0)
            value = costs[best, np.arange(count)]
            better = value < cost
            cost[better], which[better] = value[better], best[better] + i
        points = np.zeros(weights.shape, bool)
        if not len(slopes):
            nothing = np.full(count, np.nan)
            return Lines(nothing, nothing, nothing, points)
        at = np.arange(count)
        points[at, first[which]] = points[at, second[which]] = True
        enough = np.array([len(set(days[w > 0])) > 1 for w in weights])
        slope = np.where(enough, slopes[which], np.nan)
        intercept = np.where(enough, intercepts[which], np.nan)
        return Lines(slope, intercept, np.full(count, np.nan), points)

    return estimate


def _line(days: np.ndarray, y: np.ndarray, weights: np.ndarray, points: np.ndarray) -> Lines:
    """Weighted least squares of y `[B, n]` on days `[n]`, row by row."""
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x = (weights @ days) / total
        mean_y = (weights * y).sum(axis=1) / total
        dx, dy = days - mean_x[:, None], y - mean_y[:, None]
        xx = (weights * dx**2).sum(axis=1)
        xy = (weights * dx * dy).sum(axis=1)
        yy = (weights * dy**2).sum(axis=1)
        slope = np.where(xx > 0, xy / np.where(xx > 0, xx, 1.0), np.nan)
        r_squared = xy**2 / (xx * yy)
    return Lines(slope, mean_y - slope * mean_x, r_squared, points)


ESTIMATORS: dict[str, Estimator] = {
    "envelope": envelope,
    "envelope_by_day": envelope_by_day,
    "stepped": stepped,
    "quantile_95": quantile(0.95),
    "quantile_90": quantile(0.90),
    "least_squares": least_squares,
}

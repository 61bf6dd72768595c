"""How many parameters the densest model of a date needs for a score, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date

import numpy as np

from densing.capacity_density import OutOfRange, effective_parameters
from densing.densing_law import Points, to_date, trend
from densing.estimators import ESTIMATORS
from densing.fitting import resample
from densing.reference import AnyReference


@dataclass(frozen=True)
class Forecast:
    """N = N̂(score) / ρ_max(day).

    Attributes:
        score, day: asked for. estimator: of the trend.
        parameters: N. low, high: interval at `level`.
        reference_parameters: N̂, what the reference would need.
        days_beyond: how far the date lies after the newest model: nothing in the data says whether
            the trend goes on.
        extrapolated: N̂ lies outside the sizes of the reference's own models.
    """

    score: float
    day: date
    estimator: str
    parameters: float
    low: float
    high: float
    level: float
    reference_parameters: float
    days_beyond: int
    extrapolated: bool


def forecast(
    score: float,
    day: date,
    points: Points,
    reference: AnyReference,
    *,
    estimator: str = "envelope",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Forecast | OutOfRange:
    """Forecast with an interval; `OutOfRange` where the reference never reaches the score.

    Each resample draws models *and* a reference: another reference shifts N̂ of the score and every
    density of the trend together, so the two must not be drawn apart.

    Args:
        score: a fraction in 0..1. day: by when.
        points: dated densities with their scores. reference: what they were computed with.
        estimator, resamples, level, seed: as for `trend`.

    Raises:
        ValueError: a score that is no fraction, points without scores, or what `trend` raises.
    """
    if points.scores is None:
        raise ValueError("a forecast needs points with their scores: see densing.dated_densities")
    size = effective_parameters([score], reference)
    if size.status[0]:
        return OutOfRange(int(size.status[0]))
    line = trend(points, estimator, resamples=0, level=level)
    target = math.log(size.parameters[0])
    constants = reference.constants()[None] if reference.draws is None else reference.draws
    rows = np.random.default_rng(seed + 1).integers(0, len(constants), resamples)
    weights = resample(len(points.names), resamples, seed)
    days = (day - points.zero).days
    found = []
    wanted = np.array([score])
    for row, weight in zip(rows, weights, strict=True):
        y = reference.log_effective(points.scores, constants[row]) - points.log_parameters
        usable = np.isfinite(y)  # a drawn reference may not reach a score
        if usable.sum() < 2:
            continue
        drawn = ESTIMATORS[estimator](points.days[usable], y[usable], weight[None, usable])
        at = drawn.slope[0] * days + drawn.intercept[0]
        if np.isfinite(at):
            found.append(float(reference.log_effective(wanted, constants[row])[0]) - at)
    log_n = target - line.log_density(day)
    low = high = log_n
    if found:
        tail = (1 - level) / 2
        low, high = np.quantile(found, [tail, 1 - tail], method="inverted_cdf")
    newest = to_date(points.days.max(), points.zero)
    with np.errstate(over="ignore"):
        return Forecast(
            score=score,
            day=day,
            estimator=estimator,
            parameters=math.exp(log_n),
            low=float(np.exp(low)),
            high=float(np.exp(high)),
            level=level,
            reference_parameters=float(size.parameters[0]),
            days_beyond=max(0, (day - newest).days),
            extrapolated=bool(size.extrapolated[0]),
        )

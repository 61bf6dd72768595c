"""The law itself: the best density of its day grows exponentially. Densing Law §3, eq. 6.

ln ρ_max(t) = A·t + B. A point estimate of A alone says little: here it comes with a bootstrap
interval over models or whole families, and with what it becomes without each family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np

from densing.estimators import ESTIMATORS
from densing.fitting import resample
from densing.fitting.fit import data_hash

LLAMA_1 = date(2023, 2, 24)  # the paper's day 0


@dataclass(frozen=True)
class Points:
    """Dated densities of models.

    Attributes:
        names, families: `[n]`.
        days: `[n]` from `zero` to release. log_density, log_parameters: `[n]` ln ρ and ln N.
        scores: `[n]` what the densities were computed from, where a forecast is wanted.
        zero: the date of day 0.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    days: np.ndarray
    log_density: np.ndarray
    log_parameters: np.ndarray
    scores: np.ndarray | None = None
    zero: date = LLAMA_1

    def __post_init__(self) -> None:
        """Refuse lengths that differ and values that are not finite."""
        columns = (self.days, self.log_density, self.log_parameters)
        sizes = {len(self.names), len(self.families), *map(len, columns)}
        if len(sizes) != 1:
            raise ValueError(f"expected as many of each, got lengths {sorted(sizes)}")
        for label, column in zip(("day", "ln density", "ln N"), columns, strict=True):
            bad = np.flatnonzero(~np.isfinite(column))
            if len(bad):
                raise ValueError(f"{self.names[bad[0]]}: its {label} is {column[bad[0]]}")

    def where(self, mask: np.ndarray) -> Points:
        """The points where `mask` `[n]` is true."""
        at = np.flatnonzero(mask)
        return Points(
            tuple(self.names[i] for i in at),
            tuple(self.families[i] for i in at),
            self.days[at],
            self.log_density[at],
            self.log_parameters[at],
            None if self.scores is None else self.scores[at],
            self.zero,
        )

    @property
    def size_correlation(self) -> float:
        """corr(ln ρ, ln N): far below 0, the trend is one of small models."""
        if len(self.names) < 3 or not (self.log_density.std() and self.log_parameters.std()):
            return 0.0
        return float(np.corrcoef(self.log_density, self.log_parameters)[0, 1])


@dataclass(frozen=True)
class Trend:
    """ln ρ_max = slope·t + intercept.

    Attributes:
        estimator: its name in `ESTIMATORS`.
        slope: A, per day. intercept: B, at day 0 (`zero`).
        r_squared: over the points the line goes through; NaN for a quantile. In sample.
        models: how many went in. points: names of those that decided the line, by date.
        low, high: interval of the slope at `level`, from `resamples` draws of `unit`.
        failed: resamples that had no line, left out of the interval.
        draws: (slope, intercept) of the resamples `[resamples - failed, 2]`.
        data_sha256: of days, ln ρ and ln N.
    """

    estimator: str
    slope: float
    intercept: float
    r_squared: float
    models: int
    points: tuple[str, ...]
    low: float
    high: float
    level: float
    resamples: int
    failed: int
    unit: str
    zero: date
    data_sha256: str
    draws: np.ndarray = field(repr=False, compare=False)

    @property
    def doubling_days(self) -> float:
        """Days in which the density doubles; negative if it falls."""
        return math.log(2) / self.slope if self.slope else math.inf

    @property
    def doubling_interval(self) -> tuple[float, float]:
        """The interval as doubling times; its end is infinite where slopes reach 0."""
        return tuple(math.log(2) / s if s > 0 else math.inf for s in (self.high, self.low))

    def log_density(self, day: date) -> float:
        """ln ρ_max on a date."""
        return self.slope * (day - self.zero).days + self.intercept

    def band(self, days: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interval of ln ρ_max at days `[m]` since `zero`."""
        lines = self.draws[:, :1] * days + self.draws[:, 1:]
        tail = (1 - self.level) / 2
        low, high = np.quantile(lines, [tail, 1 - tail], axis=0)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with units; without the draws."""
        low, high = self.doubling_interval
        return {
            "estimator": self.estimator,
            "slope": self.slope,
            "intercept": self.intercept,
            "units": {"slope": "ln density / day", "intercept": f"ln density on {self.zero}"},
            "doubling_days": self.doubling_days,
            "doubling_interval": [low, None if math.isinf(high) else high],
            "level": self.level,
            "resamples": self.resamples,
            "failed_resamples": self.failed,
            "unit": self.unit,
            "r_squared": None if math.isnan(self.r_squared) else self.r_squared,
            "models": self.models,
            "points": list(self.points),
            "data_sha256": self.data_sha256,
        }


def trend(
    points: Points,
    estimator: str = "envelope",
    *,
    resamples: int = 1000,
    unit: str = "models",
    level: float = 0.95,
    seed: int = 0,
) -> Trend:
    """Fit the trend with a bootstrap interval.

    Args:
        points: dated densities.
        estimator: a name in `ESTIMATORS`.
        resamples: for the interval; 0 for none (the interval is then the slope itself).
        unit: what is drawn: "models", or "families" (models of a family share data and recipe, so
            this interval is the honest one where families are many).
        level: of the interval. seed: of the drawing.

    Raises:
        ValueError: an unknown estimator or unit, or too few models for a line.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"unknown estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}"
        )
    if unit not in ("models", "families"):
        raise ValueError(f"unit must be 'models' or 'families', got {unit!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    run = ESTIMATORS[estimator]
    count = len(points.names)
    if count < 2:
        raise ValueError(f"a trend needs at least 2 models with a density and a date, got {count}")
    found = run(points.days, points.log_density, np.ones((1, count)))
    slope = float(found.slope[0])
    if math.isnan(slope):
        raise ValueError(
            f"{estimator}: fewer than two of the {count} models are on the line: no trend can be "
            "fitted (were all released on one day, or was the first already the densest?)"
        )
    low = high = slope
    draws = np.array([[slope, found.intercept[0]]])
    failed = 0
    if resamples:
        groups = points.families if unit == "families" else None
        lines = run(points.days, points.log_density, resample(count, resamples, seed, groups))
        good = np.isfinite(lines.slope)
        failed = int((~good).sum())
        draws = np.stack([lines.slope[good], lines.intercept[good]], axis=1)
        tail = (1 - level) / 2
        low, high = (float(v) for v in np.quantile(draws[:, 0], [tail, 1 - tail]))
    on_line = np.flatnonzero(found.points[0])
    on_line = on_line[np.lexsort((points.log_density[on_line], points.days[on_line]))]
    columns = [points.days, points.log_density, points.log_parameters]
    return Trend(
        estimator=estimator,
        slope=slope,
        intercept=float(found.intercept[0]),
        r_squared=float(found.r_squared[0]),
        models=count,
        points=tuple(points.names[i] for i in on_line),
        low=low,
        high=high,
        level=level,
        resamples=resamples,
        failed=failed,
        unit=unit,
        zero=points.zero,
        data_sha256=data_hash(["days", "log_density", "log_parameters"], columns),
        draws=draws,
    )


def leave_one_family_out(points: Points, estimator: str = "envelope") -> list[tuple[str, float]]:
    """(family, doubling time in days without it), from the shortest to the longest.

    A family without which there is no line is listed with NaN.
    """
    found = []
    for family in sorted(set(points.families)):
        rest = points.where(np.array([f != family for f in points.families]))
        try:
            found.append((family, trend(rest, estimator, resamples=0).doubling_days))
        except ValueError:
            found.append((family, math.nan))
    return sorted(found, key=lambda row: (math.isnan(row[1]), row[1]))


def to_days(dates: Sequence[date], zero: date = LLAMA_1) -> np.ndarray:
    """Days from `zero` to each date `[n]`."""
    return np.array([(d - zero).days for d in dates], np.float64)


def to_date(days: float, zero: date = LLAMA_1) -> date:
    """The date some days after `zero`."""
    return zero + timedelta(days=float(days))

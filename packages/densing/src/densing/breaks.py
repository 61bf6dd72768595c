"""Did growth change on a date? Two separate trends and the ratio of their slopes. Densing Law §3.4.

The paper: MMLU densities grew at 0.0048 a day before ChatGPT and at 0.0073 after.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from densing.densing_law import Points, Trend, trend

FEW_POINTS = 6  # a line through fewer is a guess


@dataclass(frozen=True)
class Break:
    """Growth before and after a date.

    Attributes:
        on: the date. before, after: the two trends.
        ratio: slope after / slope before, with its interval (`low`, `high`).
        warnings: what makes the comparison weak.
    """

    on: date
    before: Trend
    after: Trend
    ratio: float
    low: float
    high: float
    warnings: tuple[str, ...]


def pre_post(
    points: Points,
    on: date = date(2022, 11, 30),
    estimator: str = "envelope",
    **options: Any,
) -> Break:
    """Two separate trends, before a date and from it on; the paper's is ChatGPT's release.

    Args:
        points: dated densities, on both sides of the date.
        on: the first day of "after".
        estimator, options: as for `trend`.

    Raises:
        ValueError: one side has too few models.
    """
    day = (on - points.zero).days
    parts = points.where(points.days < day), points.where(points.days >= day)
    trends = []
    for name, part in zip(("before", "from"), parts, strict=True):
        try:
            trends.append(trend(part, estimator, **options))
        except ValueError as error:
            raise ValueError(f"{name} {on}: {error}") from None
    before, after = trends
    warnings = tuple(
        f"{len(t.points)} points decide the trend {side} {on}: fewer than {FEW_POINTS}"
        for side, t in (("before", before), ("from", after))
        if len(t.points) < FEW_POINTS
    )
    count = min(len(before.draws), len(after.draws))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = after.draws[:count, 0] / before.draws[:count, 0]
    # Growth of zero or less before: the ratio has no meaning in that draw, and counts as infinite.
    ratios = np.where(before.draws[:count, 0] > 0, ratios, np.inf)
    tail = (1 - before.level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], method="inverted_cdf")
    return Break(on, before, after, after.slope / before.slope, float(low), float(high), warnings)

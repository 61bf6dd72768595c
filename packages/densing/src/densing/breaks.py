"""Did growth change on a date? Two separate trends and the ratio of their slopes. Densing Law §3.4.

The paper: MMLU densities grew at 0.0048 a day before ChatGPT and at 0.0073 after. Its way has a
catch: a running maximum that starts anew on the date starts with whatever comes next, below the
record, and catching up looks like growth. So the trend that counts on from the record is there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from densing.densing_law import Points, Trend, trend

FEW_POINTS = 6  # a line through fewer is a guess
RUNNING_MAXIMA = ("envelope", "envelope_by_day", "stepped")


@dataclass(frozen=True)
class Break:
    """Growth before and after a date.

    Attributes:
        on: the date. before, after: the two trends.
        ratio: slope after / slope before, with its interval (`low`, `high`).
        carried: the trend after, only of models denser than all before the date; None where there
            are too few, and for estimators that have no running maximum to start anew.
        warnings: what makes the comparison weak.
    """

    on: date
    before: Trend
    after: Trend
    ratio: float
    low: float
    high: float
    carried: Trend | None
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
    carried = None
    if estimator in RUNNING_MAXIMA:
        records = parts[1].where(parts[1].log_density > parts[0].log_density.max())
        if len(set(records.days)) >= 2:
            carried = trend(records, estimator, **options)
    found = [(f"before {on}", before), (f"from {on}", after)]
    if carried:
        found.append((f"from {on}, counted on", carried))
    warnings = tuple(
        f"{len(t.points)} points decide the trend {side}: fewer than {FEW_POINTS}"
        for side, t in found
        if len(t.points) < FEW_POINTS
    )
    count = min(len(before.draws), len(after.draws))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = after.draws[:count, 0] / before.draws[:count, 0]
    # Growth of zero or less before: the ratio has no meaning in that draw, and counts as infinite.
    ratios = np.where(before.draws[:count, 0] > 0, ratios, np.inf)
    tail = (1 - before.level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], method="inverted_cdf")
    ratio = after.slope / before.slope
    return Break(on, before, after, ratio, float(low), float(high), carried, warnings)

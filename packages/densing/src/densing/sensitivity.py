"""The table that belongs beside every headline: what the doubling time becomes by other choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from densing.densing_law import Trend, leave_one_family_out, to_date, trend
from densing.estimators import ESTIMATORS
from densing.table_density import Choices, DatedDensities, dated_densities
from densing.tables import ModelTable

SIZES = (1e9, 3e9, 5e9, 7e9)
MARGINS = (0.0, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Row:
    """One other choice.

    Attributes:
        choice: which was changed. value: to what.
        doubling_days, low, high: with the interval; None where no trend could be fitted.
        r_squared: in sample. models, points: how many went in, and decided.
        note: why there is no trend, or what else to know.
    """

    choice: str
    value: str
    doubling_days: float | None
    low: float | None = None
    high: float | None = None
    r_squared: float | None = None
    models: int = 0
    points: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite ends are null."""
        values = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }


@dataclass(frozen=True)
class Headline:
    """A trend, and the table that must stand beside it."""

    densities: DatedDensities
    trend: Trend
    sensitivity: tuple[Row, ...]

    @property
    def range(self) -> tuple[float, float]:
        """The shortest and longest positive doubling time of the whole table."""
        times = [r.doubling_days for r in self.sensitivity if (r.doubling_days or 0) > 0]
        times.append(self.trend.doubling_days)
        return min(times), max(times)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        choices = self.densities.choices
        return {
            "trend": self.trend.to_dict(),
            "sensitivity": [row.to_dict() for row in self.sensitivity],
            "size_correlation": self.densities.points.size_correlation,
            "choices": {
                "basis": choices.basis,
                "benchmark": choices.scored_on.name,
                "anchor": choices.anchor,
                "margin": choices.margin,
                "min_parameters": choices.min_parameters,
                "since": str(choices.since),
                "until": str(choices.until),
            },
            "models": [
                {
                    "name": p.model.name,
                    "family": p.model.family,
                    "released": str(p.model.released),
                    "parameters": p.density.parameters,
                    "score": p.score,
                    "density": p.density.ratio,
                    "low": p.density.low,
                    "high": p.density.high
                    if p.density.high is not None and math.isfinite(p.density.high)
                    else None,
                }
                for p in self.densities.placed
            ],
            "left_out": [list(pair) for pair in self.densities.left_out],
        }


def headline(
    table: ModelTable,
    choices: Choices,
    estimator: str = "envelope",
    *,
    anchors: Sequence[str] = (),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    unit: str = "models",
) -> Headline:
    """The trend by the given choices, and by every other.

    Args:
        table, choices: see `dated_densities`. estimator: see `trend`.
        anchors: other families to try as the reference.
        resamples, level, seed, unit: of the intervals, see `trend`.

    Raises:
        ValueError: the headline's own trend cannot be fitted.
    """
    options = {"resamples": resamples, "level": level, "seed": seed, "unit": unit}
    main = dated_densities(table, choices, level=level)
    found = trend(main.points, estimator, **options)
    return Headline(
        main, found, tuple(_rows(table, choices, estimator, main, list(anchors), options))
    )


def _rows(
    table: ModelTable,
    choices: Choices,
    estimator: str,
    main: DatedDensities,
    anchors: list[str],
    options: dict[str, Any],
) -> Iterator[Row]:
    for name in ESTIMATORS:
        yield _row("estimator", name, main, name, options)
    drawn = "families" if options["unit"] == "models" else "models"
    yield _row("bootstrap unit", drawn, main, estimator, {**options, "unit": drawn})
    without = leave_one_family_out(main.points, estimator)
    for which, (family, days) in (("shortest", without[0]), ("longest", without[-1])):
        shown = None if math.isnan(days) else days
        yield Row("without a family", f"{family} ({which})", shown)
    variations: list[tuple[str, str, Choices]] = [
        ("minimum size", f"{size / 1e9:g}B", replace(choices, min_parameters=size))
        for size in SIZES
    ]
    variations += [("margin above chance", f"{m:.0%}", replace(choices, margin=m)) for m in MARGINS]
    variations += [
        ("released until", str(end), replace(choices, until=end)) for end in _year_ends(main)
    ]
    other = "active" if choices.basis == "total" else "total"
    variations.append(("parameters", other, replace(choices, basis=other)))
    variations += [("reference", a, replace(choices, anchor=a)) for a in anchors]
    variations += [
        ("benchmark", name, replace(choices, benchmark=name))
        for name in table.benchmarks()
        if name != choices.scored_on.name
    ]
    for choice, value, changed in variations:
        yield _varied(table, choice, value, changed, anchors, estimator, options)


def _year_ends(main: DatedDensities) -> list[date]:
    """Ends of years that have half a year of models before them, and some after."""
    first, last = (to_date(float(f(main.points.days)), main.points.zero) for f in (min, max))
    ends = (date(year, 12, 31) for year in range(first.year, last.year))
    return [end for end in ends if (end - first).days > 180]


def _varied(
    table: ModelTable,
    choice: str,
    value: str,
    changed: Choices,
    anchors: list[str],
    estimator: str,
    options: dict[str, Any],
) -> Row:
    """A row by other choices; where the anchor has no scores there, by the next that has."""
    problem = ""
    for anchor in [changed.anchor, *anchors]:
        try:
            found = dated_densities(table, replace(changed, anchor=anchor))
        except ValueError as error:
            problem = problem or str(error)
            continue
        label = value if anchor == changed.anchor else f"{value} (reference {anchor})"
        return _row(choice, label, found, estimator, options)
    return Row(choice, value, None, note=problem)


def _row(
    choice: str, value: str, found: DatedDensities, estimator: str, options: dict[str, Any]
) -> Row:
    try:
        line = trend(found.points, estimator, **options)
    except ValueError as error:
        return Row(choice, value, None, models=len(found.points.names), note=str(error))
    low, high = line.doubling_interval
    return Row(
        choice,
        value,
        line.doubling_days,
        low,
        high,
        None if math.isnan(line.r_squared) else line.r_squared,
        line.models,
        len(line.points),
        f"{line.failed} resamples without a line" if line.failed else "",
    )


def table_text(found: Headline) -> str:
    """The headline and its sensitivity as plain text."""
    line, points = found.trend, found.densities.points
    low, high = line.doubling_interval
    choices = found.densities.choices
    shortest, longest = found.range
    lines = [
        f"density doubles in {_days(line.doubling_days)} days "
        f"({line.level:.0%} interval {_days(low)} to {_days(high)}), "
        f"A = {line.slope:.5f} a day, R² = {line.r_squared:.3f} in sample",
        f"{choices.scored_on.name}, {line.estimator} through {len(line.points)} of {line.models} "
        f"models, {choices.basis} parameters, reference {found.densities.reference_name}, "
        f"corr(ln density, ln N) = {points.size_correlation:+.2f}",
        f"by other choices, {_days(shortest)} to {_days(longest)} days:",
        "",
        f"{'choice':<20} {'value':<28} {'days':>7} {'interval':>16} {'R²':>6} {'models':>7} "
        f"{'on line':>8}",
    ]
    for row in found.sensitivity:
        interval = "" if row.low is None else f"{_days(row.low)} – {_days(row.high)}"
        r2 = "" if row.r_squared is None else f"{row.r_squared:.3f}"
        counts = f"{row.models:>7} {row.points:>8}" if row.models else f"{'':>16}"
        lines.append(
            f"{row.choice:<20} {row.value:<28} {_days(row.doubling_days):>7} {interval:>16} "
            f"{r2:>6} {counts}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def _days(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isinf(value) or value > 99999:
        return "∞"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"

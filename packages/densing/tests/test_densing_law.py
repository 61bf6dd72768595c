"""Estimators against brute force and SciPy, trends against planted ones, breaks, forecasts."""

from __future__ import annotations

import json
import math
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from densing import (
    FamilyReference,
    OutOfRange,
    Points,
    combined_doubling,
    compression,
    forecast,
    halving_time,
    leave_one_family_out,
    pre_post,
    trend,
)
from densing.corollaries import DAYS_PER_MONTH, DAYS_PER_YEAR
from densing.estimators import ESTIMATORS, quantile

ZERO = date(2023, 2, 24)


def points(days, log_density, families=None, scores=None) -> Points:  # noqa: ANN001
    n = len(days)
    return Points(
        tuple(f"m{i}" for i in range(n)),
        tuple(families or [f"f{i % 4}" for i in range(n)]),
        np.asarray(days, float),
        np.asarray(log_density, float),
        np.linspace(20, 25, n),
        scores,
        ZERO,
    )


def simulated(doubling: float = 100.0, count: int = 60, seed: int = 0) -> Points:
    """The best double every `doubling` days; most models lie below the best."""
    draw = np.random.default_rng(seed)
    days = np.sort(draw.integers(0, 900, count))
    below = np.where(draw.random(count) < 0.3, 0.0, draw.exponential(1.5, count))
    return points(days, math.log(2) / doubling * days - below + 0.05 * draw.normal(size=count))


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_recovers_a_planted_doubling(estimator: str) -> None:
    days = np.arange(0, 600, 20.0)
    found = trend(points(days, math.log(2) / 95 * days), estimator, resamples=50)
    assert found.doubling_days == pytest.approx(95)
    low, high = found.doubling_interval
    assert low <= 95.0001 and high >= 94.9999
    assert found.log_density(ZERO + timedelta(days=190)) == pytest.approx(2 * math.log(2))


def records(order: list[int], y: np.ndarray) -> list[int]:
    """The records of a sequence, one at a time."""
    best, found = -math.inf, []
    for i in order:
        if y[i] > best:
            best = y[i]
            found.append(i)
    return found


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 25))
def test_envelopes_are_those_of_a_plain_loop(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    days = draw.integers(0, 12, count).astype(float)  # many models share a day
    y = draw.normal(size=count)
    weights = draw.integers(0, 3, (4, count)).astype(float)
    for b in range(4):
        drawn = [i for i in range(count) if weights[b, i] > 0]
        for name, tie in (("envelope", 1), ("envelope_by_day", -1)):
            wanted = records(sorted(drawn, key=lambda i: (days[i], tie * y[i])), y)  # noqa: B023
            found = ESTIMATORS[name](days, y, weights[b : b + 1])
            assert sorted(np.flatnonzero(found.points[0])) == sorted(wanted)
            if len(set(days[wanted])) > 1:
                line = np.polyfit(days[wanted], y[wanted], 1)
                assert [found.slope[0], found.intercept[0]] == pytest.approx(line)
            else:
                assert math.isnan(found.slope[0])
        found = ESTIMATORS["stepped"](days, y, weights[b : b + 1])
        dates = sorted({days[i] for i in drawn})
        if len(dates) > 1:
            steps = [max(y[i] for i in drawn if days[i] <= d) for d in dates]
            assert [found.slope[0], found.intercept[0]] == pytest.approx(
                np.polyfit(dates, steps, 1)
            )


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_quantile_regression_solves_its_linear_programme(level: float) -> None:
    draw = np.random.default_rng(4)
    for _ in range(8):
        count = int(draw.integers(5, 20))
        days = draw.integers(0, 400, count).astype(float)
        y = draw.normal(size=count)
        weights = draw.integers(0, 3, count).astype(float)
        found = quantile(level)(days, y, weights[None])
        # min Σ w(level·u + (1-level)·v) with y - s·t - i = u - v.
        cost = np.concatenate([[0, 0, 0, 0], weights * level, weights * (1 - level)])
        design = np.stack([days, np.ones(count)], axis=1)
        equal = np.hstack([design, -design, np.eye(count), -np.eye(count)])
        best = linprog(cost, A_eq=equal, b_eq=y, bounds=(0, None))
        residual = y - found.slope[0] * days - found.intercept[0]
        mine = weights @ np.maximum(level * residual, (level - 1) * residual)
        assert mine == pytest.approx(best.fun, rel=1e-9, abs=1e-12)


def test_resamples_in_one_call_are_those_of_many() -> None:
    p = simulated()
    weights = np.random.default_rng(0).integers(0, 3, (7, 60)).astype(float)
    for name, run in ESTIMATORS.items():
        together = run(p.days, p.log_density, weights)
        for b in range(7):
            alone = run(p.days, p.log_density, weights[b : b + 1])
            assert together.slope[b] == pytest.approx(alone.slope[0]), name


def test_intervals_hold_the_truth_and_families_widen_them() -> None:
    hits = 0
    for seed in range(30):
        found = trend(simulated(seed=seed), "least_squares", resamples=200)
        low, high = found.doubling_interval
        hits += low <= 100 <= high
    assert hits >= 24  # 28.5 expected
    draw = np.random.default_rng(0)
    family = np.repeat(np.arange(8), 6)
    days = draw.uniform(0, 100, 8)[family] * 8
    y = days * 0.007 + draw.normal(size=8)[family] + 0.05 * draw.normal(size=48)
    p = points(days, y, [str(f) for f in family])
    one, whole = (trend(p, "least_squares", unit=u) for u in ("models", "families"))
    assert whole.high - whole.low > 1.5 * (one.high - one.low)


def test_a_doubling_time_may_be_unbounded() -> None:
    draw = np.random.default_rng(0)
    found = trend(points(np.arange(12.0), draw.normal(size=12)), "least_squares", resamples=300)
    assert found.doubling_interval[1] == math.inf
    json.dumps(found.to_dict(), allow_nan=False)


def test_leave_one_family_out() -> None:
    p = points([0, 100, 200, 300], [0, 1, 2, 9.0], ["a", "b", "c", "outlier"])
    found = dict(leave_one_family_out(p))
    assert found["outlier"] == pytest.approx(100 * math.log(2))
    assert min(found, key=lambda k: found[k]) != "outlier"
    assert set(found) == {"a", "b", "c", "outlier"}


def test_pre_post_finds_a_change_of_pace() -> None:
    days = np.arange(-700, 700, 35.0)
    y = np.where(days < 0, 0.004, 0.008) * days
    found = pre_post(points(days, y), ZERO, resamples=200)
    assert found.ratio == pytest.approx(2, rel=0.02)
    assert found.low <= found.ratio <= found.high and found.warnings == ()
    few = pre_post(points([-90, -50, -10, *range(0, 200, 20)], np.arange(13.0)), ZERO, resamples=50)
    assert any("fewer than 6" in w for w in few.warnings)
    with pytest.raises(ValueError, match="before 2023-02-24: a trend needs at least 2 models"):
        pre_post(points([1, 2, 3], [1, 2, 3]), ZERO)


def test_an_envelope_that_starts_anew_takes_catching_up_for_growth() -> None:
    """Steady growth; after the date the weak ones come first."""
    days = np.arange(-700.0, 700, 20)
    below = np.where((days >= 0) & (days < 200), 1.5, 0.0)
    found = pre_post(points(days, 0.005 * days - below), ZERO, resamples=50)
    assert found.before.slope == pytest.approx(0.005)
    assert found.ratio > 1.2
    assert found.carried is not None
    assert found.carried.slope == pytest.approx(0.005)
    assert pre_post(points(days, 0.005 * days), ZERO, "least_squares", resamples=9).carried is None


def test_corollaries() -> None:
    assert combined_doubling(100.5, 2.1 * DAYS_PER_YEAR) == pytest.approx(88.9, abs=0.05)
    assert 20 / 0.075 == pytest.approx(266.7, abs=0.05)
    # The paper prints 2.6 months; its own prices and dates give 2.48.
    found = halving_time(20, 0.075, 20 * DAYS_PER_MONTH) / DAYS_PER_MONTH
    assert found == pytest.approx(2.48, abs=0.005)
    arrows = compression({"big": 1.0, "small": 2.0, "tiny": 0.4}, {"small": "big", "tiny": "big",
                                                                   "lost": "gone"})  # fmt: skip
    assert [(a.child, a.ratio) for a in arrows] == [("small", 2.0), ("tiny", 0.4)]
    with pytest.raises(ValueError, match="must be positive, got -1"):
        combined_doubling(-1, 2)
    with pytest.raises(ValueError, match="first > last"):
        halving_time(1, 2, 3)


def test_forecast_is_the_trend_read_sideways() -> None:
    reference = FamilyReference(0.75, -18.0, 0.25, sizes=(1e9, 1e11))
    days = np.arange(0, 500, 25.0)
    sizes = np.exp(np.linspace(20, 25, len(days)))
    density = 2 ** (days / 100)
    scores = reference.expected_score(sizes * density)
    p = points(days, np.log(density), scores=np.asarray(scores))
    found = forecast(0.7, ZERO + timedelta(days=600), p, reference, resamples=100)
    needed = found.reference_parameters
    assert reference.expected_score(needed) == pytest.approx(0.7)
    assert found.parameters == pytest.approx(needed / 2**6, rel=1e-6)
    assert found.low <= found.parameters * 1.0001 and found.high >= found.parameters * 0.9999
    assert found.days_beyond == 125
    assert forecast(0.2, ZERO, p, reference) is OutOfRange.BELOW
    with pytest.raises(ValueError, match="points with their scores"):
        forecast(0.7, ZERO, points(days, np.log(density)), reference)


def test_bad_arguments_are_named() -> None:
    p = simulated()
    with pytest.raises(ValueError, match="unknown estimator 'median'"):
        trend(p, "median")
    with pytest.raises(ValueError, match="unit must be"):
        trend(p, unit="days")
    with pytest.raises(ValueError, match="at least 2 models .* got 1"):
        trend(points([1], [1]))
    with pytest.raises(ValueError, match="fewer than two of the 2 models are on the line"):
        trend(points([0, 5], [2, 1]))
    with pytest.raises(ValueError, match="m1: its ln density is nan"):
        points([0, 1], [0, math.nan])
    with pytest.raises(ValueError, match="as many of each"):
        Points(("a",), (), np.zeros(1), np.zeros(1), np.zeros(1))

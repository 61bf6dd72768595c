from __future__ import annotations

import math

import pytest

from densing import combined_doubling, fit_trend, halving_time
from densing.trend import DAYS_PER_YEAR


def test_recovers_a_planted_doubling_and_ignores_what_lies_below() -> None:
    days = [0, 50, 120, 200, 333, 400]
    best = [0.1 * 2 ** (d / 95) for d in days]
    below = [0.05 * 2 ** (d / 95) for d in days]
    trend = fit_trend(days[::-1] + days, best[::-1] + below)
    assert trend.doubling_days == pytest.approx(95)
    assert trend.r_squared == pytest.approx(1)
    assert trend.envelope == (5, 4, 3, 2, 1, 0)


def test_two_models_of_one_day_count_once() -> None:
    assert fit_trend([0, 10, 10, 20], [1, 2, 3, 4]).envelope == (0, 2, 3)


def test_corollaries() -> None:
    assert combined_doubling(100.5, 2.1 * DAYS_PER_YEAR) == pytest.approx(88.9, abs=0.05)
    months = DAYS_PER_YEAR / 12
    assert 20 / 0.075 == pytest.approx(266.7, abs=0.05)
    # The paper prints 2.6 months; its own prices and dates give 2.48.
    assert halving_time(20, 0.075, 20 * months) / months == pytest.approx(2.48, abs=0.005)


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="entry 1: day 5.0, density -1.0"):
        fit_trend([0, 5], [1, -1])
    with pytest.raises(ValueError, match="fewer than two models"):
        fit_trend([0, 5], [2, 1])
    with pytest.raises(ValueError, match="one density for each day"):
        fit_trend([0], [1, 2])
    with pytest.raises(ValueError, match="must be positive, got -1"):
        combined_doubling(-1, 2)
    with pytest.raises(ValueError, match="first > last"):
        halving_time(1, 2, 3)
    assert math.isclose(halving_time(4, 1, 10), 5)

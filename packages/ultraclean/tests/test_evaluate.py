from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultraclean import (
    auc,
    bootstrap_auc,
    bootstrap_f1,
    by_source,
    calibration,
    precision_recall_f1,
    threshold_for_budget,
    threshold_for_percentile,
)

labelled = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9, 1.0]), st.booleans()), min_size=2
).filter(lambda rows: 0 < sum(good for _, good in rows) < len(rows))


@given(labelled)
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[float, bool]]) -> None:
    good = [s for s, is_good in rows if is_good]
    bad = [s for s, is_good in rows if not is_good]
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    scores, labels = zip(*rows, strict=True)
    assert auc(scores, labels) == pytest.approx(wins / (len(good) * len(bad)))


def test_bootstrap_interval_covers_and_repeats() -> None:
    draw = np.random.default_rng(0)
    scores = np.r_[draw.normal(1, 1, 300), draw.normal(0, 1, 300)]
    labels = [True] * 300 + [False] * 300
    value, low, high = bootstrap_auc(scores, labels, seed=3)
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1,1) > N(0,1)) = Φ(1/√2)
    assert low < truth < high
    assert low < value < high < low + 0.15
    assert bootstrap_auc(scores, labels, seed=3) == (value, low, high)


@given(labelled, st.sampled_from([0.0, 0.5, 0.95]))
def test_precision_and_recall_by_counting(rows: list[tuple[float, bool]], at: float) -> None:
    scores, labels = zip(*rows, strict=True)
    found = precision_recall_f1(scores, labels, at)
    hits = sum(s >= at and g for s, g in rows)
    kept = sum(s >= at for s, _ in rows)
    assert found.recall == pytest.approx(hits / sum(labels))
    if kept:
        assert found.precision == pytest.approx(hits / kept)
    else:
        assert math.isnan(found.precision)


def test_calibration_of_honest_and_overconfident_scores() -> None:
    draw = np.random.default_rng(1)
    shares = draw.random(20_000)
    labels = draw.random(20_000) < shares
    assert calibration(shares, labels)[1] < 0.02
    assert calibration(np.round(shares), labels)[1] > 0.2


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1),
    st.floats(0.01, 1.0),
)
def test_budget_is_reached_and_no_higher_threshold_reaches_it(rows, keep: float) -> None:
    scores, weights = zip(*rows, strict=True)
    threshold = threshold_for_budget(scores, weights, keep)

    def kept(at: float) -> float:
        return sum(w for s, w in rows if s >= at) / sum(weights)

    assert kept(threshold) >= keep - 1e-9
    assert kept(threshold + 0.5) < keep or threshold == max(scores) == threshold + 0.5


def test_interval_of_f1_is_that_of_drawing_texts_again() -> None:
    draw = np.random.default_rng(2)
    scores = np.r_[draw.normal(1, 1, 200), draw.normal(0, 1, 300)]
    labels = np.r_[np.ones(200, bool), np.zeros(300, bool)]
    value, low, high = bootstrap_f1(scores, labels, 0.5)
    assert value == precision_recall_f1(scores, labels, 0.5).f1
    again = []
    for _ in range(2000):  # the long way
        drawn = np.r_[draw.choice(scores[:200], 200), draw.choice(scores[200:], 300)]
        again.append(precision_recall_f1(drawn, labels, 0.5).f1)
    np.testing.assert_allclose((low, high), np.percentile(again, [2.5, 97.5]), atol=0.01)


def test_rows_by_source() -> None:
    scores, labels = [0.9, 0.4, 0.8, 0.1, 0.2], [True, True, False, False, False]
    a, b_good, b_bad = by_source(scores, labels, ["a", "b", "b", "b", "b"])
    assert (a.source, a.good, a.texts, a.share_kept, a.auc) == ("a", True, 1, 1.0, 1.0)
    assert (b_good.source, b_good.good, b_good.auc) == ("b", True, pytest.approx(2 / 3))
    assert (b_bad.texts, b_bad.share_kept) == (3, pytest.approx(1 / 3))
    assert b_bad.mean_score == pytest.approx(1.1 / 3)
    assert b_bad.auc == auc(scores, labels)  # all the bad texts are of that source
    with pytest.raises(ValueError, match="one source for each score"):
        by_source(scores, labels, ["a"])


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 99))
def test_percentile_keeps_its_share(scores: list[int], percentile: int) -> None:
    threshold = threshold_for_percentile(scores, percentile)
    above = sum(s > threshold for s in scores)
    kept = sum(s >= threshold for s in scores)
    assert above * 100 < (100 - percentile) * len(scores) + 1e-6 <= kept * 100 + 1e-3


def test_errors() -> None:
    with pytest.raises(ValueError, match="only one kind"):
        auc([0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match="one label for each score"):
        auc([0.1], [True, False])
    with pytest.raises(ValueError, match="score number 1 is NaN"):
        auc([0.1, math.nan], [True, False])
    with pytest.raises(ValueError, match="keep must be in"):
        threshold_for_budget([1.0], [1.0], 0)

"""How good is a score? Ranking, thresholds, calibration, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """P(a good text scores above a bad one), ties counting half: the area under the ROC curve.

    Raises:
        ValueError: lengths differ, or only one kind of label.
    """
    s, good = _check(scores, labels)
    return float(_auc(s, good))


def _auc(s: np.ndarray, good: np.ndarray) -> float:
    # Mann–Whitney: mean rank of the good, ties sharing their mean rank.
    _, inverse, counts = np.unique(s, return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    rank = (upper - (counts - 1) / 2)[inverse]
    n_good = good.sum()
    n_bad = len(good) - n_good
    return (rank[good].sum() - n_good * (n_good + 1) / 2) / (n_good * n_bad)


def bootstrap_auc(
    scores: Sequence[float], labels: Sequence[bool], *, seed: int = 0, samples: int = 500
) -> tuple[float, float, float]:
    """AUC with its 95 % percentile interval, resampling good and bad texts apart.

    Returns:
        (value, low, high).

    Raises:
        ValueError: as `auc`.
    """
    s, labelled = _check(scores, labels)
    good, bad = s[labelled], s[~labelled]
    draw = np.random.default_rng(seed)
    mask = np.r_[np.ones(len(good), bool), np.zeros(len(bad), bool)]
    values = [
        _auc(np.r_[draw.choice(good, len(good)), draw.choice(bad, len(bad))], mask)
        for _ in range(samples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(_auc(s, labelled)), float(low), float(high)


@dataclass(frozen=True)
class PrecisionRecallF1:
    """At one threshold, with the good texts as the ones to find; NaN where undefined."""

    precision: float
    recall: float
    f1: float


def precision_recall_f1(
    scores: Sequence[float], labels: Sequence[bool], threshold: float = 0.5
) -> PrecisionRecallF1:
    """Of what scores at least `threshold`: how much is good, and how much of the good it is."""
    s, good = _check(scores, labels)
    kept = s >= threshold
    hits = float((kept & good).sum())
    precision = hits / kept.sum() if kept.any() else float("nan")
    recall = hits / good.sum()
    f1 = 2 * hits / (kept.sum() + good.sum())
    return PrecisionRecallF1(float(precision), float(recall), float(f1))


def calibration(
    scores: Sequence[float], labels: Sequence[bool], bins: int = 10
) -> tuple[list[tuple[float, float, int]], float]:
    """Does a score of 0.8 mean that 80 % are good?

    Returns:
        for each non-empty bin of equal width (mean score, share good, texts), and the expected
        calibration error: the mean distance of the two, weighted by texts.
    """
    s, good = _check(scores, labels)
    index = np.minimum((s * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if inside.any():
            rows.append((float(s[inside].mean()), float(good[inside].mean()), int(inside.sum())))
    error = sum(abs(mean - share) * n for mean, share, n in rows) / len(s)
    return rows, float(error)


def threshold_for_budget(scores: Sequence[float], weights: Sequence[float], keep: float) -> float:
    """The threshold that keeps the best-scoring share `keep` of the total weight.

    Args:
        scores: one for each text.
        weights: what a text counts, tokens or characters, >= 0.
        keep: share of the total weight, in (0, 1].

    Returns:
        the highest threshold at which `score >= threshold` keeps at least that share. Texts with
        equal scores are kept together, so the share kept may be larger.

    Raises:
        ValueError: nothing to choose from, or `keep` out of range.
    """
    s, w = np.asarray(scores, np.float64), np.asarray(weights, np.float64)
    if len(s) != len(w) or not len(s):
        raise ValueError(
            f"expected as many weights as scores and at least one, got {len(s)} and {len(w)}"
        )
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    order = np.argsort(-s, kind="stable")
    enough = np.searchsorted(np.cumsum(w[order]), keep * w.sum() * (1 - 1e-12))
    return float(s[order][min(enough, len(s) - 1)])


def _check(scores: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    s, good = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if len(s) != len(good):
        raise ValueError(f"expected one label for each score, got {len(s)} and {len(good)}")
    if good.all() or not good.any():
        raise ValueError("need both good and bad texts, got only one kind of label")
    if np.isnan(s).any():
        raise ValueError(f"score number {int(np.isnan(s).argmax())} is NaN")
    return s, good

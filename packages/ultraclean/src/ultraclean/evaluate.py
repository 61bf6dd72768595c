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
    return _auc(s, good)


def _auc(s: np.ndarray, good: np.ndarray) -> float:
    values, place = np.unique(s, return_inverse=True)
    return _auc_of_counts(
        np.bincount(place[good], minlength=len(values)),
        np.bincount(place[~good], minlength=len(values)),
    )


def _auc_of_counts(good: np.ndarray, bad: np.ndarray) -> float:
    """Good and bad texts at each different score, ascending: int64 `[scores]` both.

    A good text beats all bad ones below it and half of those beside it.
    """
    beaten = 2 * np.cumsum(bad) - bad  # twice, so that all is exact
    return float(good @ beaten) / (2.0 * float(good.sum()) * float(bad.sum()))


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
    values, place = np.unique(s, return_inverse=True)
    good, bad = place[labelled], place[~labelled]
    draw = np.random.default_rng(seed)

    def again(texts: np.ndarray) -> np.ndarray:
        return np.bincount(draw.choice(texts, len(texts)), minlength=len(values))

    found = [_auc_of_counts(again(good), again(bad)) for _ in range(samples)]
    low, high = np.percentile(found, [2.5, 97.5])
    return _auc(s, labelled), float(low), float(high)


def bootstrap_f1(
    scores: Sequence[float],
    labels: Sequence[bool],
    threshold: float = 0.5,
    *,
    seed: int = 0,
    samples: int = 500,
) -> tuple[float, float, float]:
    """F1 at a threshold with its 95 % percentile interval, resampling good and bad texts apart.

    Returns:
        (value, low, high).

    Raises:
        ValueError: as `auc`.
    """
    s, good = _check(scores, labels)
    n_good, n_bad = int(good.sum()), int((~good).sum())
    hits, alarms = int((s[good] >= threshold).sum()), int((s[~good] >= threshold).sum())
    draw = np.random.default_rng(seed)
    # Resampling texts of which a share is kept is drawing their number from a binomial.
    again = draw.binomial([n_good, n_bad], [hits / n_good, alarms / n_bad], (samples, 2))
    found = 2 * again[:, 0] / (again.sum(1) + n_good)
    low, high = np.percentile(found, [2.5, 97.5])
    return precision_recall_f1(scores, labels, threshold).f1, float(low), float(high)


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

    Raises:
        ValueError: as `auc`, a score outside 0..1, or no bin.
    """
    s, good = _check(scores, labels)
    if s.min() < 0 or s.max() > 1 or bins < 1:
        raise ValueError(
            f"need scores in 0..1 and at least one bin, got {s.min()}..{s.max()} and {bins}"
        )
    index = np.minimum((s * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if inside.any():
            rows.append((float(s[inside].mean()), float(good[inside].mean()), int(inside.sum())))
    error = sum(abs(mean - share) * n for mean, share, n in rows) / len(s)
    return rows, float(error)


@dataclass(frozen=True)
class SourceRow:
    """How the texts of one source and one label fare."""

    source: str
    good: bool
    texts: int
    mean_score: float
    share_kept: float
    auc: float
    """Of these texts against all of the other label, whatever their source: a classifier that
    has learned topics, not quality, is strong on some sources and weak on others."""


def by_source(
    scores: Sequence[float],
    labels: Sequence[bool],
    sources: Sequence[str],
    threshold: float = 0.5,
) -> list[SourceRow]:
    """A row for each source and label that occur together, by name, good before bad.

    Raises:
        ValueError: as `auc`, or not one source for each score.
    """
    s, good = _check(scores, labels)
    names = np.asarray(sources, dtype=object)
    if len(names) != len(s):
        raise ValueError(f"expected one source for each score, got {len(names)} and {len(s)}")
    rows = []
    for source, is_good in sorted(
        set(zip(names.tolist(), good.tolist(), strict=True)), key=lambda key: (key[0], not key[1])
    ):
        mine = (names == source) & (good == is_good)
        compared = mine | (good != is_good)
        rows.append(
            SourceRow(
                source=source,
                good=is_good,
                texts=int(mine.sum()),
                mean_score=float(s[mine].mean()),
                share_kept=float((s[mine] >= threshold).mean()),
                auc=_auc(s[compared], good[compared]),
            )
        )
    return rows


def threshold_for_budget(
    scores: Sequence[float], weights: Sequence[float], keep: float = 0.3
) -> float:
    """The threshold that keeps the best-scoring share `keep` of the total weight.

    Args:
        scores: one for each text.
        weights: what a text counts, tokens or characters: >= 0, and not all 0.
        keep: share of the total weight, in (0, 1].

    Returns:
        the highest threshold at which `score >= threshold` keeps at least that share. Texts with
        equal scores are kept together, so the share kept may be larger.

    Raises:
        ValueError: nothing to choose from, a bad weight, or `keep` out of range.
    """
    s, w = np.asarray(scores, np.float64), np.asarray(weights, np.float64)
    if len(s) != len(w) or not len(s):
        raise ValueError(
            f"expected as many weights as scores and at least one, got {len(s)} and {len(w)}"
        )
    if not (w >= 0).all() or not 0 < w.sum() < np.inf:
        raise ValueError("weights must be finite, not negative and not all 0")
    if np.isnan(s).any():
        raise ValueError(f"score number {int(np.isnan(s).argmax())} is NaN")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    order = np.argsort(-s, kind="stable")
    enough = np.searchsorted(np.cumsum(w[order]), keep * w.sum() * (1 - 1e-12))
    return float(s[order][min(enough, len(s) - 1)])


def threshold_for_percentile(scores: Sequence[float], percentile: float) -> float:
    """The threshold that at least `100 − percentile` per cent of the texts reach.

    Args:
        scores: one for each text.
        percentile: 0..100, exclusive of 100; 90 keeps the best tenth, as DCLM does.

    Raises:
        ValueError: no score, or a percentile out of range.
    """
    if not 0 <= percentile < 100:
        raise ValueError(f"percentile must be in [0, 100), got {percentile}")
    return threshold_for_budget(scores, np.ones(len(scores)), 1 - percentile / 100)


def _check(scores: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    s, good = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if len(s) != len(good):
        raise ValueError(f"expected one label for each score, got {len(s)} and {len(good)}")
    if good.all() or not good.any():
        raise ValueError("need both good and bad texts, got only one kind of label")
    if np.isnan(s).any():
        raise ValueError(f"score number {int(np.isnan(s).argmax())} is NaN")
    return s, good

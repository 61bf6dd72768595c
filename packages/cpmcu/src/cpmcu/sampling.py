"""Choose the next token from logits: one pure function over a vector, one for the draw.

Order and semantics follow transformers: repetition penalty (arXiv:1909.05858), temperature,
top-k (arXiv:1805.04833), top-p (arXiv:1904.09751), min-p (arXiv:2407.01082).
In NumPy, on one thread: a vocabulary is a small vector, and the draw is the same whatever backend
made the logits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FEW = 512  # tokens among which the likeliest are looked for first


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw. The defaults are greedy; `temperature` 0 ignores top_p, top_k and min_p.

    temperature >= 0; 0 < top_p <= 1; top_k >= 0 (0: off); 0 <= min_p <= 1;
    repetition_penalty > 0 (1: off). ValueError outside these ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges. Written so that NaN fails too."""
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "an integer >= 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a number > 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


def generator(seed: int | None) -> random.Random:
    """Numbers for draws; those of a seed (64 bits) are the same everywhere, None gives new ones."""
    # The sign is not lost: Python takes a negative seed for its magnitude.
    return random.Random(None if seed is None else seed % 2**64)


def penalise(logits: np.ndarray, penalty: float, previous: Sequence[int]) -> np.ndarray:
    """Logits [V] with those of `previous` tokens divided by `penalty` (multiplied if negative)."""
    if penalty == 1.0 or not previous:
        return logits
    seen = np.array(sorted(set(previous)))
    values, factor = logits[seen], np.float32(penalty)
    logits = logits.copy()
    logits[seen] = np.where(values < 0, values * factor, values / factor)
    return logits


def probabilities(logits: np.ndarray, how: Sampling, previous: Sequence[int] = ()) -> np.ndarray:
    """The distribution to draw from, float32 [V]: sums to 1, zero outside what the filters keep.

    Args:
        logits: finite or -inf, [V].
        how: `temperature` 0 gives all mass to the largest logit (lowest index on a tie).
        previous: tokens of the prompt and the text so far, for the repetition penalty.
    """
    logits = penalise(np.asarray(logits, np.float32), how.repetition_penalty, previous)
    if how.temperature == 0:
        only = np.zeros_like(logits)
        only[logits.argmax()] = 1.0
        return only
    # The maximum first: dividing by a tiny temperature must not overflow to inf - inf.
    with np.errstate(over="ignore"):
        logits = ((logits - logits.max()).astype(np.float64) / how.temperature).astype(np.float32)
    if 0 < how.top_k < len(logits):
        least = np.partition(logits, -how.top_k)[-how.top_k]
        logits = np.where(logits < least, -np.inf, logits)
    if how.top_p < 1:
        logits = _nucleus(logits, how.top_p)
    if how.min_p > 0:
        p = _softmax(logits)
        logits = np.where(p < np.float32(how.min_p) * p.max(), -np.inf, logits)
    return _softmax(logits)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Of logits of which the largest is 0."""
    p = np.exp(logits, dtype=np.float32)
    return p / p.sum(dtype=np.float64).astype(np.float32)


def _nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    """-inf for all but the likeliest tokens that together reach `top_p`.

    They are nearly always few, and the largest of a vocabulary are found in a tenth of the time
    that sorting it takes.
    """
    whole = np.exp(logits).sum(dtype=np.float64)
    for most in (_FEW, len(logits)):
        few = min(most, len(logits))
        order = np.argpartition(logits, -few)[-few:]
        # Of equals the first: the order does not depend on how many are looked at.
        order = order[np.lexsort((order, -logits[order]))]
        mass = np.exp(logits[order], dtype=np.float64) / whole
        reached = mass.cumsum()
        if reached[-1] >= top_p:
            break
    # Keep a token if what is before it has not reached top_p > 0: the first always stays.
    kept = order[(reached - mass) < top_p]
    left = np.full_like(logits, -np.inf)
    left[kept] = logits[kept]
    return left


def sample(
    logits: np.ndarray,
    how: Sampling,
    previous: Sequence[int] = (),
    numbers: random.Random | None = None,
) -> int:
    """One token id drawn from `probabilities`, by one of `numbers` (`generator`)."""
    if how.temperature == 0:
        logits = np.asarray(logits, np.float32)
        return int(penalise(logits, how.repetition_penalty, previous).argmax())
    reached = probabilities(logits, how, previous).cumsum(dtype=np.float64)
    at = min((numbers or random).random() * reached[-1], np.nextafter(reached[-1], 0))
    # The first token whose share of the line ends behind it: one of probability 0 has none.
    return int(np.searchsorted(reached, at, side="right"))


def log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Sum over the rows of logits [T, V] of the logarithm of their target's probability."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):  # a row fits a cache
        most = row.max()
        total += float(row[target] - most) - math.log(np.exp(row - most).sum(dtype=np.float64))
    return total

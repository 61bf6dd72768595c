"""Capacity density: effective parameters over real ones, ρ = N̂ / N. Densing Law §2, eq. 1.

A reference, read backwards from a model's score, gives N̂: the size at which the reference itself
would score as well. Outside its range there is no such size, and the answer says so by its type.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from densing.reference import AnyReference, LossLaw, positive


class OutOfRange(enum.IntEnum):
    """Why a score has no effective size. An answer of its own, so that no NaN goes on silently."""

    BELOW = -1
    """The reference never scores this low, at any size: N̂ is 0."""
    ABOVE = 1
    """The reference never scores this high, at any size and its tokens: N̂ is infinite."""


@dataclass(frozen=True)
class Effective:
    """Effective sizes of many scores.

    Attributes:
        parameters: N̂ `[n]` float64; 0 where below the reference's range, infinite where above.
        status: `[n]` int8: 0 where there is an N̂, else the value of an `OutOfRange`.
        extrapolated: `[n]` bool: N̂ lies outside the sizes that the reference was fitted to.
    """

    parameters: np.ndarray
    status: np.ndarray
    extrapolated: np.ndarray


def effective_parameters(
    scores: Sequence[float] | np.ndarray, reference: AnyReference
) -> Effective:
    """N̂ of many scores: the exact inverse of `reference.expected_score`.

    Args:
        scores: fractions `[n]`.
        reference: of either kind.

    Raises:
        ValueError: a score that is no fraction, NaN included.
    """
    values = _fractions(scores)
    log_n = reference.log_effective(values, reference.constants())
    status = np.where(np.isneginf(log_n), -1, np.where(np.isposinf(log_n), 1, 0)).astype(np.int8)
    with np.errstate(over="ignore"):
        found = np.exp(log_n)
    low, high = reference.sizes
    outside = (status == 0) & ((found < low) | (found > high))
    return Effective(found, status, outside)


def effective_from_losses(
    losses: Sequence[float] | np.ndarray,
    law: LossLaw,
    tokens: float,
    sizes: tuple[float, float] = (0.0, np.inf),
) -> Effective:
    """N̂ of models whose conditional loss was measured: the loss law alone, inverted (eq. 4, last).

    Args:
        losses: in the law's own unit `[n]`.
        law: fitted to the ladder. tokens: D of the models, or D₀.
        sizes: least and greatest N that the law was fitted to.

    Raises:
        ValueError: a loss that is not positive, or tokens that are not.
    """
    values = positive("losses", losses)
    rest = values - law.irreducible - law.b * positive("tokens", tokens) ** -law.beta
    reached = rest > 0
    with np.errstate(over="ignore"):
        found = (np.where(reached, rest, 1.0) / law.a) ** (-1 / law.alpha)
    reached &= np.isfinite(found)
    found = np.where(reached, found, np.inf)
    status = np.where(reached, 0, int(OutOfRange.ABOVE)).astype(np.int8)
    outside = reached & ((found < sizes[0]) | (found > sizes[1]))
    return Effective(found, status, outside)


@dataclass(frozen=True)
class Density:
    """A model's density.

    Attributes:
        parameters: N. effective_parameters: N̂, None out of range. ratio: ρ, None out of range.
        low, high: interval of ρ at `level`; 0 or infinite where it reaches out of range; None where
            the reference has no draws.
        level: of confidence.
        out_of_range: why there is no N̂.
        extrapolated: N̂ lies outside the sizes of the reference's own models.
    """

    parameters: float
    effective_parameters: float | None
    ratio: float | None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    out_of_range: OutOfRange | None = None
    extrapolated: bool = False


def density(
    score: float,
    parameters: float,
    reference: AnyReference,
    *,
    questions: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Density:
    """ρ = N̂ / N of a model (eq. 1), with an interval.

    Args:
        score: fraction in 0..1 on the benchmark that the reference was fitted to.
        parameters: N, total or active: the caller's choice, the same for all models compared.
        reference: of either kind. Its draws give the interval.
        questions: of the benchmark (MMLU: 14,042); adds the score's own sampling error.
        level: of the interval. seed: of the sampling error.

    Raises:
        ValueError: N not positive, or a score that is no fraction.
    """
    n = float(positive("parameters", parameters))
    found = effective_parameters([score], reference)
    low, high = interval(np.array([float(score)]), reference, questions, level, seed)
    ends = (None, None) if low is None else (float(low[0] / n), float(high[0] / n))
    if found.status[0]:
        why = OutOfRange(int(found.status[0]))
        return Density(n, None, None, *ends, level, why)
    size = float(found.parameters[0])
    return Density(n, size, size / n, *ends, level, None, bool(found.extrapolated[0]))


def interval(
    scores: np.ndarray,
    reference: AnyReference,
    questions: int | None,
    level: float,
    seed: int = 0,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Ends `[n]` of the intervals of N̂; (None, None) where the reference has no draws."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if reference.draws is None or not len(reference.draws):
        return None, None
    values = np.repeat(scores[None], len(reference.draws), axis=0)
    if questions is not None:
        spread = np.sqrt(scores * (1 - scores) / positive("questions", questions))
        noise = np.random.default_rng(seed).normal(size=values.shape)
        values = np.clip(values + spread * noise, 0.0, 1.0)
    log_n = reference.log_effective(values, np.asarray(reference.draws))
    tail = (1 - level) / 2
    # No interpolation: between a number and infinity there is nothing to interpolate.
    low, high = np.quantile(log_n, [tail, 1 - tail], axis=0, method="inverted_cdf")
    with np.errstate(over="ignore"):
        return np.exp(low), np.exp(high)


def _fractions(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(bad):
        value = values[bad[0]]
        hint = "leave the model out, or find its score" if np.isnan(value) else "percent?"
        raise ValueError(f"score {bad[0]} is {value}: expected a fraction in 0..1 ({hint})")
    return values

"""Capacity density: effective parameters over real ones. Densing Law, arXiv 2412.04315 §2.

A reference family gives two curves: the loss of a model of N parameters trained on D tokens, and
the score that goes with a loss. Read backwards from a model's score they give N̂, the size the
reference would need for that score; the model's density is ρ = N̂ / N. Units: N in parameters, D in
tokens, loss in nats per token, scores as fractions in 0..1; all float64.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class OutOfRange(enum.Enum):
    """Why a score has no effective size. An answer of its own, so that no NaN goes on silently."""

    BELOW = "the reference never scores this low, at any size"
    ABOVE = "the reference never scores this high, at any size and these tokens"


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = a·N^-α + b·D^-β + e (eq. 2; the paper has e = 0, most other laws do not).

    Args:
        a: > 0. alpha: > 0. b: > 0. beta: > 0. irreducible: e >= 0.

    Raises:
        ValueError: a constant out of range.
    """

    a: float
    alpha: float
    b: float
    beta: float
    irreducible: float = 0.0

    def __post_init__(self) -> None:
        """Refuse constants that make no falling curve."""
        for name in ("a", "alpha", "b", "beta"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"LossLaw.{name} must be positive and finite, got {value}")
        if not (self.irreducible >= 0 and math.isfinite(self.irreducible)):
            raise ValueError(f"LossLaw.irreducible must be at least 0, got {self.irreducible}")

    def __call__(self, parameters: float, tokens: float) -> float:
        """Loss of N parameters trained on D tokens."""
        _check_positive(parameters=parameters, tokens=tokens)
        return self.a * parameters**-self.alpha + self.b * tokens**-self.beta + self.irreducible

    def parameters(self, loss: float, tokens: float) -> float | OutOfRange:
        """N with L(N, D) = loss: the inverse in N.

        ABOVE where even infinitely many parameters leave more loss than that.
        """
        _check_positive(tokens=tokens)
        rest = loss - self.irreducible - self.b * tokens**-self.beta
        if rest <= 0:
            return OutOfRange.ABOVE
        return (rest / self.a) ** (-1 / self.alpha)


@dataclass(frozen=True)
class ScoreLaw:
    """S(L) = c / (1 + exp(-γ (L - l))) + d (eq. 3), falling in L: c > 0 and γ < 0.

    Args:
        c: height of the sigmoid, > 0.
        gamma: steepness, < 0: the paper's formula needs this sign for scores that fall with loss.
        l: loss at half height.
        d: the floor, the score of guessing.

    Raises:
        ValueError: a sign that makes scores rise with loss.
    """

    c: float
    gamma: float
    l: float
    d: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a curve that rises with loss."""
        if not self.c > 0:
            raise ValueError(f"ScoreLaw.c must be positive, got {self.c}")
        if not self.gamma < 0:
            raise ValueError(
                f"ScoreLaw.gamma must be negative (scores fall as loss rises), got {self.gamma}"
            )

    def __call__(self, loss: float) -> float:
        """Score at a loss."""
        return self.c / (1 + math.exp(min(700.0, -self.gamma * (loss - self.l)))) + self.d

    def loss(self, score: float) -> float | OutOfRange:
        """L with S(L) = score; only scores strictly between d and d + c have one."""
        if math.isnan(score):
            raise ValueError("score is NaN: leave the model out, or find its score")
        if score <= self.d:
            return OutOfRange.BELOW
        if score >= self.d + self.c:
            return OutOfRange.ABOVE
        return self.l - math.log(self.c / (score - self.d) - 1) / self.gamma


@dataclass(frozen=True)
class Reference:
    """A reference family: its two laws, and the tokens D₀ its models are imagined trained on."""

    loss: LossLaw
    score: ScoreLaw
    tokens: float = 1e12

    def effective_parameters(self, score: float) -> float | OutOfRange:
        """N̂ (eq. 4): the size at which the reference reaches `score`."""
        loss = self.score.loss(score)
        if isinstance(loss, OutOfRange):
            return loss
        if loss <= 0:
            return OutOfRange.ABOVE
        return self.loss.parameters(loss, self.tokens)


@dataclass(frozen=True)
class Density:
    """A model's density: `ratio` = `effective_parameters` / parameters, or why there is none."""

    parameters: float
    effective_parameters: float | None
    ratio: float | None
    out_of_range: OutOfRange | None = None


def density(score: float, parameters: float, reference: Reference) -> Density:
    """ρ = N̂ / N of a model (eq. 1).

    Args:
        score: fraction in 0..1 on the benchmark that the reference was fitted to.
        parameters: N, total or active: the caller's choice, the same for all models compared.
        reference: the family.

    Raises:
        ValueError: N not positive, or a score that is no fraction.
    """
    _check_positive(parameters=parameters)
    if not 0 <= score <= 1:
        raise ValueError(f"score must be a fraction in 0..1, got {score} (percent? divide by 100)")
    effective = reference.effective_parameters(score)
    if isinstance(effective, OutOfRange):
        return Density(parameters, None, None, effective)
    return Density(parameters, effective, effective / parameters)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")

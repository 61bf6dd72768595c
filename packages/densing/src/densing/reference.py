"""The reference: the size at which it would score as well, eqs. 2-4 of arXiv 2412.04315, inverted.

Two kinds: the paper's two laws, loss from (N, D) and score from loss; or a public family whose
score grows with ln N. `log_effective` is the exact inverse of `expected_score`.

Units: N in parameters, D in tokens, loss in nats per token (or per byte, as the laws were fitted),
scores as fractions in 0..1; all float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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

    def __call__(self, parameters: Any, tokens: Any) -> Any:
        """Loss of N parameters trained on D tokens; numbers or arrays that broadcast."""
        n, d = positive("parameters", parameters), positive("tokens", tokens)
        return _plain(self.a * n**-self.alpha + self.b * d**-self.beta + self.irreducible)


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

    def __call__(self, loss: Any) -> Any:
        """Score at a loss, number or array."""
        exponent = np.clip(-self.gamma * (np.asarray(loss, np.float64) - self.l), None, 700.0)
        return _plain(self.c / (1 + np.exp(exponent)) + self.d)


@dataclass(frozen=True)
class Reference:
    """A ladder of reference models: its two laws, and the tokens D₀ they are imagined trained on.

    Args:
        loss, score: the laws. tokens: D₀; the paper's is 1T.
        sizes: least and greatest N that the laws were fitted to; beyond is extrapolation.
        draws: constants of resampled fits `[draws, 9]` (a, α, b, β, e, c, γ, l, d), for intervals.
        fits: where the laws come from, JSON-ready.
    """

    loss: LossLaw
    score: ScoreLaw
    tokens: float = 1e12
    sizes: tuple[float, float] = (0.0, math.inf)
    draws: np.ndarray | None = field(default=None, compare=False, repr=False)
    fits: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse tokens that are none."""
        positive("tokens", self.tokens)

    def expected_score(self, parameters: Any) -> Any:
        """S of a reference model of N parameters trained on D₀ tokens."""
        return self.score(self.loss(parameters, self.tokens))

    def constants(self) -> np.ndarray:
        """The nine constants, in the order of `draws`."""
        one, two = self.loss, self.score
        first = [one.a, one.alpha, one.b, one.beta, one.irreducible]
        return np.array([*first, two.c, two.gamma, two.l, two.d])

    def log_effective(self, scores: np.ndarray, constants: np.ndarray) -> np.ndarray:
        """ln N̂ of scores `[n]` for constants `[9]` or `[draws, 9]` -> `[n]` or `[draws, n]`.

        Eq. 4: L̂ = l + ln((S-d)/(c+d-S))/γ, N̂ = ((L̂ - e - b·D₀^-β)/a)^(-1/α). Minus infinity where
        below the range, plus infinity where above.
        """
        k = [np.asarray(constants[..., i, None], np.float64) for i in range(9)]
        a, alpha, b, beta, e, c, gamma, l, d = k
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            loss = l + (np.log(scores - d) - np.log(c + d - scores)) / gamma
            rest = loss - e - b * self.tokens**-beta
            log_n = (np.log(a) - np.log(rest)) / alpha
        log_n = np.where(rest > 0, log_n, np.inf)
        log_n = np.where(scores >= c + d, np.inf, log_n)
        log_n = np.where(scores <= d, -np.inf, log_n)
        return log_n


@dataclass(frozen=True)
class FamilyReference:
    """A public family as the anchor: the logit of its score grows linearly with ln N.

    logit((S - chance)/(ceiling - chance)) = slope·ln N + intercept. By construction its own
    members have density around 1.

    Args:
        slope: > 0. intercept: of the line.
        chance: score of guessing. ceiling: best possible score.
        family: its name. sizes, draws (`[draws, 2]`), fits: as in `Reference`.
    """

    slope: float
    intercept: float
    chance: float
    ceiling: float = 1.0
    family: str = ""
    sizes: tuple[float, float] = (0.0, math.inf)
    draws: np.ndarray | None = field(default=None, compare=False, repr=False)
    fits: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a family that does not get better with size."""
        if not self.slope > 0:
            raise ValueError(
                f"the family {self.family!r} must score higher with size to be an anchor: "
                f"slope {self.slope:.3g}"
            )
        if not 0 <= self.chance < self.ceiling <= 1:
            raise ValueError(f"expected 0 <= chance < ceiling <= 1: {self.chance}, {self.ceiling}")

    def expected_score(self, parameters: Any) -> Any:
        """S of a member of N parameters."""
        n = positive("parameters", parameters)
        logit = self.slope * np.log(n) + self.intercept
        return _plain(self.chance + (self.ceiling - self.chance) / (1 + np.exp(-logit)))

    def constants(self) -> np.ndarray:
        """(slope, intercept)."""
        return np.array([self.slope, self.intercept])

    def log_effective(self, scores: np.ndarray, constants: np.ndarray) -> np.ndarray:
        """As `Reference.log_effective`, for constants `[2]` or `[draws, 2]`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logit = np.log(scores - self.chance) - np.log(self.ceiling - scores)
        logit = np.where(scores <= self.chance, -np.inf, logit)
        logit = np.where(scores >= self.ceiling, np.inf, logit)
        return (logit - constants[..., 1, None]) / constants[..., 0, None]


AnyReference = Reference | FamilyReference


def positive(name: str, value: Any) -> np.ndarray:
    """A positive, finite number or array, or a ValueError that names it."""
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return array


def _plain(value: np.ndarray) -> Any:
    """A float for a float, an array for an array."""
    return float(value) if np.ndim(value) == 0 else value

"""What the data leave open: profile intervals, constants at a bound, directions that are flat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from densing.fitting.fit import Fit, observations
from densing.fitting.minimise import minimise
from densing.fitting.objective import HuberObjective

POINTS = 41  # of a profile, on each pass
REACH = 12.0  # how far a coordinate is followed before it counts as open


@dataclass(frozen=True)
class Interval:
    """Values of a constant that the data do not refuse.

    Attributes:
        name: of the constant. level: of confidence. best: the fitted value.
        low, high: ends; infinite (or 0 for a positive constant) where the profile stays low.
        open_below, open_above: whether the data set no end on that side.
    """

    name: str
    level: float
    best: float
    low: float
    high: float
    open_below: bool
    open_above: bool


@dataclass(frozen=True)
class Flag:
    """Something about a fit that a reader must know.

    Attributes:
        kind: "bound" (a constant went to the end of its range), "open" (its profile interval has
            no end), "flat" (a combination of constants is free), "starts" (hardly any of the
            starting points agree), "extrapolation".
        constants: whom it concerns. message: in a sentence.
    """

    kind: str
    constants: tuple[str, ...]
    message: str


def profile(fitted: Fit, data: Mapping[str, Any], name: str, level: float = 0.95) -> Interval:
    """Interval of one constant by refitting all others along it.

    The objective may rise by λ·χ²₁(level)/2 with λ = E[ψ²] / E[ψ′] of the residuals: the robust
    likelihood-ratio test (Heritier & Ronchetti 1994), which for least squares is the usual one.

    Args:
        fitted: the fit of the same data. data: as given to `fit`.
        name: of the constant. level: in (0, 1).

    Raises:
        ValueError: an unknown constant or level.
    """
    from scipy.stats import chi2

    names = list(fitted.form.constants)
    if name not in names:
        raise ValueError(f"unknown constant {name!r}: expected one of {', '.join(names)}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    problem = _Problem(fitted, data)
    at = names.index(name)
    allowed = problem.best_value + 0.5 * problem.dispersion * float(chi2.ppf(level, 1))
    ends, opens = [], []
    for sign in (-1.0, 1.0):
        end, is_open = problem.follow(at, sign, allowed)
        ends.append(end)
        opens.append(is_open)
    constants = []
    for end in ends:
        theta = problem.theta.copy()
        theta[at] = end
        constants.append(float(fitted.form.to_constants(theta)[at]))
    # A coordinate may run against its constant (γ = -e^x does).
    order = np.argsort(constants)
    low, high = (constants[i] for i in order)
    open_below, open_above = (opens[i] for i in order)
    positive = float(fitted.form.to_constants(np.full(len(names), -REACH * 60))[at]) >= 0
    return Interval(
        name,
        level,
        fitted.constants[name],
        (0.0 if positive else -np.inf) if open_below else low,
        np.inf if open_above else high,
        open_below,
        open_above,
    )


def identify(fitted: Fit, data: Mapping[str, Any], level: float = 0.95) -> list[Flag]:
    """Flags of a fit, empty if all is well.

    Args:
        fitted: the fit of the same data. data: as given to `fit`.
        level: of the profile intervals.
    """
    problem = _Problem(fitted, data)
    names = list(fitted.form.constants)
    flags = []
    shares = _shares(fitted, data)
    for name, share in shares.items():
        if share < 1e-6:
            high = profile(fitted, data, name, level).high
            text = f"{name} went to 0, the end of its range: {level:.0%} interval [0, {high:.3g}]"
            flags.append(Flag("bound", (name,), text))
    width = np.sqrt(np.maximum(np.diag(problem.covariance()), 0))
    for i, name in enumerate(names):
        # The curvature tells where to look; only the profile tells what the data refuse.
        if name in {n for f in flags for n in f.constants} or width[i] < 0.2 * fitted.form.free[i]:
            continue
        found = profile(fitted, data, name, level)
        if found.open_below or found.open_above or width[i] > fitted.form.free[i]:
            text = f"{level:.0%} interval [{found.low:.3g}, {found.high:.3g}]"
            flags.append(Flag("open", (name,), f"{name} is not identified: {text}"))
    for direction in problem.flat_directions():
        parts = [(p, n) for p, n in zip(direction, names, strict=True) if abs(p) > 0.1]
        if len(parts) == 1:
            continue  # a single constant: said above
        text = ", ".join(f"{p:+.2f} {n}" for p, n in parts)
        flags.append(
            Flag("flat", tuple(n for _, n in parts), f"a combination of constants is free: {text}")
        )
    if fitted.starts >= 10 and fitted.agreeing < 0.1 * fitted.starts:
        flags.append(
            Flag(
                "starts",
                tuple(names),
                f"only {fitted.agreeing} of {fitted.starts} starting points reach the optimum",
            )
        )
    return flags


def _shares(fitted: Fit, data: Mapping[str, Any]) -> dict[str, float]:
    """Largest share that a positive constant's own term has in any prediction."""
    x, _ = observations(fitted.form, data)
    z = fitted.form.features(x)
    _, pullback = fitted.form.evaluate(fitted.theta[None], z)
    found = {}
    for i, name in enumerate(fitted.form.constants):
        if name in ("a", "b", "e"):
            # By its logarithm, the derivative of ln L is the term's share of L.
            each = [pullback(np.eye(1, z.shape[1], k))[0][i] for k in range(z.shape[1])]
            found[name] = float(np.max(np.abs(each)))
    return found


class _Problem:
    """A fit's objective with what profiles and curvature need of it."""

    def __init__(self, fitted: Fit, data: Mapping[str, Any]) -> None:
        x, y = observations(fitted.form, data)
        self.form = fitted.form
        self.z, self.t = fitted.form.features(x), fitted.form.target(y)
        self.delta, self.theta = fitted.delta, fitted.theta
        self.objective = HuberObjective(self.form, self.z, self.t, np.ones(len(y)), self.delta)
        self.best_value = fitted.objective
        self.residual = self.form.evaluate(self.theta[None], self.z)[0][0] - self.t
        self.dispersion = self._dispersion()

    def _dispersion(self) -> float:
        """E[ψ²] / E[ψ′], with n - P for n as in least squares."""
        n, p = len(self.t), len(self.theta)
        size = np.abs(self.residual)
        psi = np.minimum(size, self.delta)
        if np.isinf(self.delta):
            curvature = 1.0
        else:
            # With a δ far below the residuals few lie inside; a wider window estimates the density.
            window = max(self.delta, float(np.quantile(size, 0.3)))
            curvature = float((size <= window).mean()) * self.delta / max(window, 1e-300)
        return float((psi**2).sum() / max(1, n - p)) / max(curvature, 1e-300)

    def follow(self, at: int, sign: float, allowed: float) -> tuple[float, bool]:
        """Where the profile along coordinate `at` passes `allowed`; True if it does not."""
        width = float(np.sqrt(max(self.covariance()[at, at], 1e-300)))
        step = max(min(width if np.isfinite(width) else 1.0, REACH / 4), 1e-12)
        inner, theta, reach = self.theta[at], self.theta, max(REACH, 30 * step)
        distance = step
        while True:
            target = self.theta[at] + sign * distance
            value, found = self._refit(at, target, theta)
            if value > allowed:
                break
            if value < self.best_value:
                self.best_value = value
            inner, theta = target, found
            if distance >= reach:
                return target, True
            distance = min(2 * distance, reach)
        outer = self.theta[at] + sign * distance
        for _ in range(40):
            middle = 0.5 * (inner + outer)
            value, found = self._refit(at, middle, theta)
            if value > allowed:
                outer = middle
            else:
                inner, theta = middle, found
            if abs(outer - inner) <= 1e-4 * step:
                break
        return 0.5 * (inner + outer), False

    def _refit(self, at: int, target: float, near: np.ndarray) -> tuple[float, np.ndarray]:
        """Minimum over the other coordinates, from the neighbour's optimum and from the fit's."""
        starts = np.stack([near, self.theta])
        starts[:, at] = target
        fixed = np.zeros(len(self.theta), bool)
        fixed[at] = True
        found = minimise(self.objective, starts, fixed=fixed)
        best = int(np.argmin(found.value))
        return float(found.value[best]), found.theta[best]

    def covariance(self) -> np.ndarray:
        """Of the coordinates `[P, P]`, from the Gauss-Newton curvature; infinite where flat."""
        jacobian = self.jacobian()
        values, vectors = np.linalg.eigh(jacobian.T @ jacobian)
        values = np.maximum(values, values.max() * 1e-16)
        scale = self._residual_scale()
        return scale**2 * (vectors / values) @ vectors.T

    def _residual_scale(self) -> float:
        """Spread of the residuals as least squares sees them, from the robust dispersion."""
        n, p = len(self.t), len(self.theta)
        psi = np.minimum(np.abs(self.residual), self.delta)
        if np.isinf(self.delta):
            return float(np.sqrt((psi**2).sum() / max(1, n - p)))
        window = max(self.delta, float(np.quantile(np.abs(self.residual), 0.3)))
        share = float((np.abs(self.residual) <= window).mean())
        curvature = share * self.delta / max(window, 1e-300)
        return float(np.sqrt((psi**2).sum() / max(1, n - p))) / max(curvature, 1e-300)

    def jacobian(self) -> np.ndarray:
        """Derivatives of the predictions `[n, P]`."""
        n = len(self.t)
        theta = np.repeat(self.theta[None], n, axis=0)
        _, pullback = self.form.evaluate(theta, self.z)
        return pullback(np.eye(n))

    def flat_directions(self) -> list[np.ndarray]:
        """Unit directions `[P]`, in units of `form.free`, in which the data say nothing."""
        free = np.where(np.isinf(self.form.free), 1e6, self.form.free)
        jacobian = self.jacobian() * free
        values, vectors = np.linalg.eigh(jacobian.T @ jacobian)
        scale = self._residual_scale()
        flat = values < scale**2  # standard error along it above 1 unit
        return [vectors[:, i] for i in np.flatnonzero(flat)]

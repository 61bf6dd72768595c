"""BFGS for many small problems at once: one vectorised evaluation serves thousands of resamples.

A scaling law has five constants and a few hundred observations, so a single fit is all overhead.
Here every array has a leading axis of problems. Each problem keeps its own inverse Hessian and
step; those that have converged leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Objective(Protocol):
    """S objectives that are evaluated together."""

    def evaluate(
        self, theta: np.ndarray, problems: np.ndarray
    ) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Values `[s]` of some problems (their indices `[s]`) at theta `[s, P]`, and a function.

        The function takes a mask `[s]` and gives the gradients of the rows it chooses: a trial
        step that is refused costs no gradient.
        """
        ...


ARMIJO = 1e-4
HALVINGS = 30


@dataclass(frozen=True)
class Minimum:
    """Where each problem ended.

    Attributes:
        theta: `[S, P]`. value: `[S]`.
        converged: `[S]` bool; False where the step limit came first.
        steps: of the slowest problem.
    """

    theta: np.ndarray
    value: np.ndarray
    converged: np.ndarray
    steps: int


def minimise(
    objective: Objective,
    theta: np.ndarray,
    *,
    fixed: np.ndarray | None = None,
    max_steps: int = 400,
    gradient_tolerance: float = 1e-12,
    value_tolerance: float = 1e-14,
) -> Minimum:
    """Minimise S independent objectives from S starting points.

    Args:
        objective: what to minimise.
        theta: starts `[S, P]`.
        fixed: coordinates `[P]` bool that do not move, for profiles.
        max_steps: after which a problem is given up.
        gradient_tolerance: a problem whose largest gradient component is below this, relative to
            1 + its value, has converged; so has one that a step improves by less than
            `value_tolerance` of its value, twice running. They are those of float64: with those of
            a general-purpose optimiser (1e-5) a *mean* of Huber losses with δ = 1e-3 passes as
            converged where it starts.
    """
    theta = np.array(theta, np.float64)
    problems, coordinates = theta.shape
    free = np.ones(coordinates) if fixed is None else (~np.asarray(fixed)).astype(np.float64)
    value, pullback = objective.evaluate(theta, np.arange(problems))
    gradient = pullback(np.ones(problems, bool)) * free
    inverse = np.repeat(np.diag(free)[None], problems, axis=0)
    converged = np.zeros(problems, bool)
    quiet = np.zeros(problems, int)
    scaled = np.zeros(problems, bool)
    active = np.flatnonzero(np.isfinite(value))
    steps = 0
    while len(active) and steps < max_steps:
        steps += 1
        g = gradient[active]
        direction = -np.einsum("sij,sj->si", inverse[active], g)
        slope = (direction * g).sum(axis=1)
        # A direction that does not descend means that rounding spoilt the estimate: start it anew.
        lost = ~(slope < 0)
        if lost.any():
            inverse[active[lost]] = np.diag(free)
            scaled[active[lost]] = False
            direction[lost], slope[lost] = -g[lost], -(g[lost] ** 2).sum(axis=1)
        # Without curvature yet, a step of a tenth of a coordinate's unit.
        young = ~scaled[active]
        length = np.where(young, 0.1 / np.maximum(np.abs(direction).sum(axis=1), 0.1), 1.0)
        new_theta, new_value, new_gradient, moved = _line_search(
            objective, theta, value, gradient, active, direction, slope, length, free
        )
        step, change = new_theta - theta[active], new_gradient - g
        gain = value[active] - new_value
        _update(inverse, scaled, active, step, change, free)
        theta[active], value[active], gradient[active] = new_theta, new_value, new_gradient
        quiet[active] = np.where(gain <= value_tolerance * np.abs(new_value), quiet[active] + 1, 0)
        size = np.abs(new_gradient).max(axis=1)
        done = (size <= gradient_tolerance * (1 + np.abs(new_value))) | (quiet[active] >= 2)
        # No step could improve it: with a fresh Hessian that is convergence, else try once afresh.
        stuck = ~moved & ~done
        afresh = stuck & scaled[active]
        inverse[active[afresh]] = np.diag(free)
        scaled[active[afresh]] = False
        done |= stuck & ~afresh & (quiet[active] >= 1)
        converged[active[done]] = True
        active = active[~done]
    return Minimum(theta, value, converged, steps)


def _line_search(
    objective: Objective,
    theta: np.ndarray,
    value: np.ndarray,
    gradient: np.ndarray,
    active: np.ndarray,
    direction: np.ndarray,
    slope: np.ndarray,
    length: np.ndarray,
    free: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Backtrack each active problem until it has come down enough; the last is who moved."""
    new_theta, new_value = theta[active].copy(), value[active].copy()
    new_gradient, moved = gradient[active].copy(), np.zeros(len(active), bool)
    todo = np.arange(len(active))
    for _ in range(HALVINGS):
        rows = active[todo]
        tried = theta[rows] + length[todo, None] * direction[todo]
        found, pullback = objective.evaluate(tried, rows)
        good = found <= value[rows] + ARMIJO * length[todo] * slope[todo]
        if good.any():
            which = todo[good]
            new_theta[which], new_value[which] = tried[good], found[good]
            new_gradient[which] = pullback(good) * free
            moved[which] = True
        if good.all():
            break
        todo, found = todo[~good], found[~good]
        # The minimum of the parabola through value, slope and what was found, kept within reason.
        rise = found - value[active[todo]] - slope[todo] * length[todo]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            parabola = -slope[todo] * length[todo] ** 2 / (2 * rise)
        parabola = np.where(np.isfinite(parabola), parabola, 0.0)
        length[todo] = np.clip(parabola, 0.1 * length[todo], 0.5 * length[todo])
    return new_theta, new_value, new_gradient, moved


def _update(
    inverse: np.ndarray,
    scaled: np.ndarray,
    active: np.ndarray,
    step: np.ndarray,
    change: np.ndarray,
    free: np.ndarray,
) -> None:
    """BFGS update of the inverse Hessians of the problems whose curvature is positive."""
    curvature = (step * change).sum(axis=1)
    lengths = np.sqrt((step**2).sum(axis=1) * (change**2).sum(axis=1))
    usable = curvature > 1e-12 * lengths
    rows = active[usable]
    if not len(rows):
        return
    s, y, sy = step[usable], change[usable], curvature[usable][:, None, None]
    h = inverse[rows]
    young = ~scaled[rows]
    if young.any():
        # The first curvature seen sets the scale of the whole estimate (Nocedal & Wright, 6.20).
        ratio = sy[young, 0, 0] / (y[young] ** 2).sum(axis=1)
        h[young] = np.diag(free)[None] * ratio[:, None, None]
        scaled[rows[young]] = True
    hy = np.einsum("sij,sj->si", h, y)
    yhy = (y * hy).sum(axis=1)[:, None, None]
    outer = s[:, :, None] * s[:, None, :]
    cross = hy[:, :, None] * s[:, None, :]
    inverse[rows] = h + (sy + yhy) / sy**2 * outer - (cross + cross.transpose(0, 2, 1)) / sy

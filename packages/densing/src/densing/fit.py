"""Fitting a loss law so that it ends at the optimum: analytic gradient, many starts, summed loss.

The well-known way to get this wrong is to average the Huber loss: with δ = 1e-3 its gradient is so
small that an optimiser with default tolerances stops where it started. Here it is summed, and the
tolerances are those of float64. Objective: Hoffmann et al. (arXiv 2203.15556) §3.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from densing.law import LossLaw

HUBER_DELTA = 1e-3


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: the constants.
        objective: summed Huber loss of the log residuals at the optimum.
        starts: how many starting points were tried; `agreeing`: how many ended within 1e-6
            (relative) of the best objective. Few of many means a hard or underdetermined fit.
    """

    law: LossLaw
    objective: float
    starts: int
    agreeing: int


def objective(
    theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray, irreducible: bool
) -> tuple[float, np.ndarray]:
    """Summed Huber loss of log L̂ - log L, and its gradient.

    Args:
        theta: (ln a, α, ln b, β) and, if `irreducible`, ln e.
        log_n, log_d, log_loss: ln of parameters, tokens and observed loss, `[observations]`.
    """
    terms = [theta[0] - theta[1] * log_n, theta[2] - theta[3] * log_d]
    if irreducible:
        terms.append(np.full_like(log_n, theta[4]))
    stacked = np.stack(terms)
    top = stacked.max(axis=0)
    weights = np.exp(stacked - top)  # log-sum-exp: ln of the sum without leaving float range
    total = weights.sum(axis=0)
    residual = top + np.log(total) - log_loss
    inside = np.abs(residual) <= HUBER_DELTA
    value = np.where(
        inside, 0.5 * residual**2, HUBER_DELTA * (np.abs(residual) - 0.5 * HUBER_DELTA)
    ).sum()
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA) * weights / total
    gradient = [
        slope[0].sum(),
        -(slope[0] * log_n).sum(),
        slope[1].sum(),
        -(slope[1] * log_d).sum(),
    ]
    if irreducible:
        gradient.append(slope[2].sum())
    return float(value), np.array(gradient)


def fit_loss_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    irreducible: bool = True,
) -> Fit:
    """Fit L(N, D) to observations by Huber loss on log residuals, from a grid of starts.

    Args:
        parameters, tokens, losses: one of each for each observation, all positive.
        irreducible: whether the law has a constant term.

    Raises:
        ValueError: fewer observations than constants, different lengths, or a value that is not
            positive and finite; the message gives its place.
    """
    from scipy.optimize import minimize

    columns = {"parameters": parameters, "tokens": tokens, "losses": losses}
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    sizes = {name: len(values) for name, values in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected as many of each, got {sizes}")
    need = 5 if irreducible else 4
    if sizes["losses"] < need:
        raise ValueError(
            f"{need} constants need at least {need} observations, got {sizes['losses']}"
        )
    for name, values in arrays.items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}: expected a positive number")
    logs = [np.log(arrays[name]) for name in ("parameters", "tokens", "losses")]
    grid = [(0.0, 6.0, 12.0), (0.1, 0.35, 0.8), (0.0, 6.0, 12.0), (0.1, 0.35, 0.8)]
    if irreducible:
        grid.append((-1.0, 0.0, 0.7))
    results = [
        minimize(
            objective,
            np.array(start),
            args=(*logs, irreducible),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-12},
        )
        for start in itertools.product(*grid)
    ]
    best = min(results, key=lambda r: r.fun)
    a, alpha, b, beta = best.x[:4]
    law = LossLaw(
        float(np.exp(a)), float(alpha), float(np.exp(b)), float(beta),
        float(np.exp(best.x[4])) if irreducible else 0.0,
    )  # fmt: skip
    close = best.fun + 1e-6 * abs(best.fun) + 1e-15
    return Fit(law, float(best.fun), len(results), sum(r.fun <= close for r in results))

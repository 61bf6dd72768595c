from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize

from densing import LossLaw, fit_loss_law
from densing.fit import HUBER_DELTA, objective

# Near the constants that a replication of Chinchilla's third approach found, and its data's shape.
TRUTH = LossLaw(482.0, 0.3478, 2085.4, 0.3658, 1.8172)


def observations(noise: float, count: int = 245) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    n = 10 ** draw.uniform(7.7, 10.2, count)
    d = 10 ** draw.uniform(9.3, 11.7, count)
    loss = np.array([TRUTH(*pair) for pair in zip(n, d, strict=True)])
    return n, d, loss * np.exp(noise * draw.normal(size=count))


def test_recovers_planted_constants() -> None:
    fit = fit_loss_law(*observations(0.0))
    for name in ("a", "alpha", "b", "beta", "irreducible"):
        assert getattr(fit.law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    noisy = fit_loss_law(*observations(0.005)).law
    assert noisy.alpha == pytest.approx(TRUTH.alpha, abs=0.03)
    assert noisy.beta == pytest.approx(TRUTH.beta, abs=0.03)


def test_without_a_constant_term() -> None:
    law = LossLaw(50, 0.3, 400, 0.25)
    n, d, _ = observations(0.0)
    losses = [law(*pair) for pair in zip(n, d, strict=True)]
    found = fit_loss_law(n, d, losses, irreducible=False).law
    assert (found.alpha, found.beta, found.irreducible) == (
        pytest.approx(0.3, rel=1e-3), pytest.approx(0.25, rel=1e-3), 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("irreducible", [True, False])
def test_gradient_is_the_objectives(irreducible: bool) -> None:
    logs = [np.log(x) for x in observations(0.01)]
    theta = np.array([6.0, 0.34, 7.5, 0.36, 0.5][: 5 if irreducible else 4])
    scale = np.abs(objective(theta, *logs, irreducible)[1]).max()
    error = check_grad(
        lambda t: objective(t, *logs, irreducible)[0],
        lambda t: objective(t, *logs, irreducible)[1],
        theta,
    )
    assert error < 1e-4 * scale


def test_an_averaged_loss_with_default_tolerances_stops_where_it_started() -> None:
    """The published mistake, and that ours is not it."""
    n, d, loss = observations(0.01)
    logs = [np.log(x) for x in (n, d, loss)]
    start = np.array([np.log(406.4), 0.34, np.log(410.7), 0.28, np.log(1.69)])
    averaged = minimize(
        lambda t: tuple(x / len(n) for x in objective(t, *logs, True)), start, jac=True,
        method="L-BFGS-B",
    )  # fmt: skip
    assert averaged.success  # it says so itself
    assert np.abs(averaged.x - start).max() < 0.02
    ours = fit_loss_law(n, d, loss)
    assert ours.objective < 0.97 * objective(averaged.x, *logs, True)[0]
    assert ours.agreeing >= 2


def test_huber_is_quadratic_inside_and_linear_outside() -> None:
    one = np.zeros(1)
    for residual in (0.3 * HUBER_DELTA, 40 * HUBER_DELTA):
        value, _ = objective(np.array([0.0, 0.0, -800.0, 0.0]), one, one, one - residual, False)
        size = abs(residual)
        expected = (
            0.5 * size**2 if size <= HUBER_DELTA else HUBER_DELTA * (size - 0.5 * HUBER_DELTA)
        )
        assert value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d, x: (n[:3], d[:3], x[:3]), "at least 5 observations, got 3"),
        (lambda n, d, x: (n[1:], d, x), "as many of each"),
        (lambda n, d, x: (n, d, np.r_[x[:-1], math.nan]), r"losses\[244\] is nan"),
        (lambda n, d, x: (np.r_[-1.0, n[1:]], d, x), r"parameters\[0\] is -1.0"),
    ],
)
def test_bad_data_is_named_by_place(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_loss_law(*change(*observations(0.0)))

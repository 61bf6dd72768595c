"""Every form's prediction against a plain formula, its gradient against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densing.fitting import Form, Line, PowerLaw, Sigmoid, form_from_dict

FORMS = [
    PowerLaw(),
    PowerLaw(irreducible=False),
    Sigmoid(),
    Sigmoid(floor=0.25),
    Sigmoid(ceiling=0.97),
    Sigmoid(floor=0.25, ceiling=1.0),
    Line(),
]


def a_case(form: Form, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `[3, P]` and inputs `[K, 7]` that a user might have."""
    draw = np.random.default_rng(seed)
    if isinstance(form, PowerLaw):
        constants = [draw.uniform(50, 900), draw.uniform(0.2, 0.6), draw.uniform(50, 3000)]
        constants += [draw.uniform(0.2, 0.6), draw.uniform(0.5, 2)]
        x = 10 ** draw.uniform([[7], [9]], [[10], [12]], (2, 7))
        constants = constants[: len(form.constants)]
    elif isinstance(form, Sigmoid):
        every = {"gamma": -draw.uniform(1, 9), "l": draw.uniform(1, 3), "d": 0.2, "c": 0.6}
        constants = [every[name] for name in form.constants]
        x = draw.uniform(0.5, 4, (1, 7))
    else:
        constants, x = list(draw.normal(size=2)), draw.normal(size=(1, 7))
    theta = form.to_coordinates(np.array(constants))
    return np.repeat(theta[None], 3, axis=0) + draw.normal(0, 0.01, (3, len(theta))), x


def formula(form: Form, constants: dict[str, float], x: np.ndarray) -> np.ndarray:
    """The paper's formula, one value at a time."""
    if isinstance(form, PowerLaw):
        c = {"e": 0.0, **constants}
        return np.array(
            [c["a"] * n ** -c["alpha"] + c["b"] * d ** -c["beta"] + c["e"] for n, d in x.T]
        )
    if isinstance(form, Sigmoid):
        w = form.whole(constants)
        return np.array(
            [w["c"] / (1 + np.exp(-w["gamma"] * (loss - w["l"]))) + w["d"] for loss in x[0]]
        )
    return np.array([constants["slope"] * v + constants["intercept"] for v in x[0]])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_predictions_are_the_formula(form: Form) -> None:
    theta, x = a_case(form, 0)
    prediction, _ = form.evaluate(theta, form.features(x))
    for row, found in zip(theta, prediction, strict=True):
        constants = dict(zip(form.constants, form.to_constants(row), strict=True))
        assert form.untarget(found) == pytest.approx(formula(form, constants, x), rel=1e-11)


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pullbacks_are_the_derivative(form: Form, seed: int) -> None:
    theta, x = a_case(form, seed)
    z = form.features(x)
    slope = np.random.default_rng(seed).normal(size=(3, 7))
    _, pullback = form.evaluate(theta, z)
    found = pullback(slope)
    for k in range(theta.shape[1]):
        step = np.zeros(theta.shape[1])
        step[k] = 1e-5
        up, down = (form.evaluate(theta + s * step, z)[0] for s in (1, -1))
        numeric = ((up - down) / 2e-5 * slope).sum(axis=1)
        assert found[:, k] == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_coordinates_and_files_go_both_ways(form: Form) -> None:
    theta, _ = a_case(form, 1)
    assert form.to_coordinates(form.to_constants(theta)) == pytest.approx(theta)
    assert form_from_dict(form.to_dict()) == form
    assert len(form.constants) == theta.shape[1] == len(form.free)


def test_extreme_coordinates_stay_finite() -> None:
    """Log-sum-exp: a start far off must not end in NaN."""
    form = PowerLaw()
    theta = np.array([[800.0, 0.1, -900.0, 2.0, -700.0], [-500, 3, -500, 3, -500]])
    prediction, pullback = form.evaluate(theta, form.features(np.full((2, 4), 1e9)))
    assert np.isfinite(prediction).all() and np.isfinite(pullback(np.ones((2, 4)))).all()


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="floor < ceiling"):
        Sigmoid(floor=0.9, ceiling=0.3)
    with pytest.raises(ValueError, match="unknown form 'spline': expected one of power_law"):
        form_from_dict({"name": "spline"})

"""Bootstraps against SciPy resample by resample, profiles against closed forms, flags."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from densing.fitting import Line, PowerLaw, Sigmoid, bootstrap, fit, identify, profile, resample

from .simulated import runs, scores
from .test_fit import huber


def test_each_resample_is_the_fit_of_that_resample() -> None:
    data = runs()
    found = fit(PowerLaw(), data)
    boot = bootstrap(found, data, resamples=40, seed=5)
    assert (boot.failed, boot.improved, boot.rechecked) == (0, 0, 16)
    weights = resample(240, 40, seed=5)
    log_n, log_d = np.log(data["parameters"]), np.log(data["tokens"])
    for k in range(0, 40, 13):

        def objective(p: np.ndarray, k: int = k) -> float:
            loss = np.exp(p[0] - p[1] * log_n) + np.exp(p[2] - p[3] * log_d) + np.exp(p[4])
            return float(weights[k] @ huber(np.log(loss) - np.log(data["loss"]), 1e-3))

        theta = PowerLaw().to_coordinates(boot.constants[k])
        oracle = minimize(
            objective,
            theta + 0.01,
            method="Nelder-Mead",
            options={"maxiter": 30000, "maxfev": 30000, "xatol": 1e-10, "fatol": 1e-16},
        )
        assert objective(theta) <= oracle.fun * (1 + 1e-8)


def test_bootstrap_errors_are_those_of_theory() -> None:
    """A line's slope: the pairs bootstrap must agree with the textbook's standard error."""
    draw = np.random.default_rng(1)
    x = draw.uniform(0, 10, 200)
    data = {"x": x, "y": 2 * x + draw.normal(size=200)}
    found = fit(Line(), data)
    boot = bootstrap(found, data, resamples=3000)
    oracle = stats.linregress(data["x"], data["y"])
    assert boot.standard_error("slope") == pytest.approx(oracle.stderr, rel=0.1)
    low, high = boot.interval("slope", 0.9)
    assert high - low == pytest.approx(2 * 1.645 * oracle.stderr, rel=0.1)


def test_whole_groups_are_drawn() -> None:
    groups = ["a", "a", "a", "b", "c", "c"]
    weights = resample(6, 50, 0, groups)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 4] == weights[:, 5]).all()
    assert (weights[:, [0, 3, 4]].sum(axis=1) == 3).all()
    assert (resample(6, 50, 0).sum(axis=1) == 6).all()
    # Models of one family move together: drawn singly, the interval would be too narrow.
    draw = np.random.default_rng(0)
    family = np.repeat(np.arange(20), 10)
    x = draw.uniform(0, 1, 20)[family]
    data = {"x": x, "y": x + draw.normal(size=20)[family] + 0.1 * draw.normal(size=200)}
    found = fit(Line(), data)
    single, whole = (bootstrap(found, data, resamples=500, groups=g) for g in (None, family))
    assert whole.unit == "groups"
    assert whole.standard_error("slope") > 2 * single.standard_error("slope")


def test_profile_of_a_line_is_the_textbook_interval() -> None:
    draw = np.random.default_rng(2)
    x = draw.uniform(0, 10, 300)
    data = {"x": x, "y": 2 * x + draw.normal(size=300)}
    found = fit(Line(), data)
    oracle = stats.linregress(data["x"], data["y"])
    interval = profile(found, data, "slope", 0.9)
    half = stats.norm.ppf(0.95) * oracle.stderr
    assert interval.low == pytest.approx(oracle.slope - half, abs=0.02 * half)
    assert interval.high == pytest.approx(oracle.slope + half, abs=0.02 * half)


@pytest.mark.parametrize(
    ("form", "data", "name"),
    [(PowerLaw(), runs(), "alpha"), (PowerLaw(), runs(), "e"), (Sigmoid(), scores(), "gamma")],
)
def test_profile_and_bootstrap_agree(form, data, name) -> None:  # noqa: ANN001
    found = fit(form, data)
    interval = profile(found, data, name)
    low, high = bootstrap(found, data, resamples=800).interval(name)
    assert interval.low < found.constants[name] < interval.high
    assert interval.high - interval.low == pytest.approx(high - low, rel=0.45)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """60 simulated data sets: the 90 % interval of α must hold 0.3478 in most of them."""
    hits = 0
    for seed in range(60):
        data = runs(count=80, seed=seed)
        found = fit(PowerLaw(), data, polished_starts=4)
        low, high = bootstrap(found, data, resamples=100, recheck=0).interval("alpha", 0.9)
        hits += low <= 0.3478 <= high
    assert 46 <= hits  # 54 expected; 46 would be 3.4 standard deviations below


def test_a_good_fit_has_no_flags() -> None:
    for form, data in ((PowerLaw(), runs()), (Sigmoid(), scores()), (PowerLaw(False), runs(60))):
        assert identify(fit(form, data), data) == [], form


def test_an_unidentified_asymptote_is_flagged() -> None:
    """Few, noisy runs, all small: e could be 0 as well."""
    every = runs(noise=0.01, seed=5)
    small = every["tokens"] < 3e9
    data = {name: column[small] for name, column in every.items()}
    found = fit(PowerLaw(), data)
    flags = [f for f in identify(found, data) if f.kind == "open"]
    assert ("e",) in [f.constants for f in flags]
    assert any("e is not identified: 95% interval [0, " in f.message for f in flags)
    interval = profile(found, data, "e")
    assert interval.open_below and not interval.open_above and interval.low == 0


def test_a_bound_is_flagged() -> None:
    """Data without irreducible loss send e to 0."""
    data = runs(count=50, noise=0.0, irreducible=False)
    flags = identify(fit(PowerLaw(), data), data)
    assert [(f.kind, f.constants) for f in flags][:1] == [("bound", ("e",))]


def test_a_flat_direction_is_flagged() -> None:
    """One model size: a and alpha cannot be told apart."""
    data = runs(count=60)
    data["parameters"][:] = 1e8
    found = fit(PowerLaw(irreducible=False), data)
    flat = [f for f in identify(found, data) if f.kind == "flat"]
    assert flat and "alpha" in flat[0].constants and "a" in flat[0].constants


def test_the_scores_of_large_losses_alone_do_not_fix_the_ceiling() -> None:
    data = scores(60)
    tail = {name: column[data["loss"] > 2.9] for name, column in data.items()}
    flags = identify(fit(Sigmoid(), tail), tail)
    assert any("c" in f.constants for f in flags)


def test_bad_arguments() -> None:
    data = runs()
    found = fit(PowerLaw(), data)
    with pytest.raises(ValueError, match="not the data that the fit was made from"):
        bootstrap(found, runs(seed=1))
    with pytest.raises(ValueError, match="unknown constant 'gamma': expected one of a, alpha"):
        profile(found, data, "gamma")
    with pytest.raises(ValueError, match="level must lie in"):
        profile(found, data, "e", 95)
    with pytest.raises(ValueError, match="a group for each of 240"):
        bootstrap(found, data, groups=["a"])
    with pytest.raises(ValueError, match="unknown constant 'x'"):
        bootstrap(found, data, resamples=10).of("x")

"""The inverse against the forward laws, its typed ends, density and its intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from densing import (
    FamilyReference,
    LossLaw,
    OutOfRange,
    Reference,
    ScoreLaw,
    density,
    effective_from_losses,
    effective_parameters,
    fit_reference,
    reference_from_dict,
    reference_to_dict,
)

REFERENCE = Reference(
    LossLaw(a=50, alpha=0.3, b=400, beta=0.3, irreducible=0.1),
    ScoreLaw(c=0.75, gamma=-4.0, l=0.3, d=0.25),
)
FAMILY = FamilyReference(slope=0.75, intercept=-18.0, chance=0.25, family="llama")

references = st.builds(
    Reference,
    st.builds(
        LossLaw,
        a=st.floats(1, 1e3), alpha=st.floats(0.1, 0.8), b=st.floats(1, 1e4),
        beta=st.floats(0.2, 0.8), irreducible=st.floats(0, 1),
    ),
    st.builds(
        ScoreLaw,
        c=st.floats(0.2, 0.75), gamma=st.floats(-12, -0.5), l=st.floats(0.2, 3),
        d=st.floats(0, 0.25),
    ),
    tokens=st.floats(1e11, 1e13),
)  # fmt: skip
families = st.builds(
    FamilyReference,
    slope=st.floats(0.2, 2),
    intercept=st.floats(-40, -4),
    chance=st.floats(0, 0.3),
    ceiling=st.floats(0.8, 1),
)


@settings(max_examples=300, deadline=None)
@given(reference=references | families, exponent=st.floats(6, 12))
def test_round_trip(reference, exponent) -> None:  # noqa: ANN001
    """N -> score -> N̂ to 1e-9, wherever float64 scores still tell sizes apart that finely."""
    size = 10**exponent
    score = reference.expected_score(size)
    found = effective_parameters([score], reference)
    # How much N̂ moves for one rounding of the score; flat ends of the sigmoid keep no digits.
    nudged = abs(math.log(reference.expected_score(size * 1.001) / score)) / 1e-3
    assume(nudged > 1e-5)
    assert found.status[0] == 0
    assert found.parameters[0] == pytest.approx(size, rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(reference=references | families, share=st.floats(0.001, 0.999))
def test_round_trip_from_the_score(reference, share) -> None:  # noqa: ANN001
    """Score -> N̂ -> score to 1e-9 always, where there is an N̂; and the end is right where not."""
    if isinstance(reference, Reference):
        low, high = reference.score.d, reference.score.d + reference.score.c
    else:
        low, high = reference.chance, reference.ceiling
    score = low + share * (high - low)
    found = effective_parameters([score], reference)
    if found.status[0] == 0 and 0 < found.parameters[0] < math.inf:
        again = reference.expected_score(found.parameters[0])
        assert again == pytest.approx(score, rel=1e-9)
    elif found.status[0] == OutOfRange.ABOVE:
        assert isinstance(reference, Reference)
        assert reference.expected_score(1e300) <= score * (1 + 1e-12)


def test_equals_a_root_finder() -> None:
    for reference in (REFERENCE, FAMILY):
        for score in (0.3, 0.45, 0.6):
            root = brentq(
                lambda x, r=reference, s=score: r.expected_score(math.exp(x)) - s,
                *(0, 60), xtol=1e-14, rtol=1e-15,
            )  # fmt: skip
            found = effective_parameters([score], reference).parameters[0]
            assert found == pytest.approx(math.exp(root), rel=1e-10)


@settings(max_examples=200, deadline=None)
@given(reference=references | families, scores=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_never_nan_and_in_order(reference, scores) -> None:  # noqa: ANN001
    found = effective_parameters(sorted(scores), reference)
    assert not np.isnan(found.parameters).any()
    assert (np.diff(found.parameters[np.isfinite(found.parameters)]) >= 0).all()
    assert (np.diff(found.status) >= 0).all()
    assert ((found.status == -1) == (found.parameters == 0))[found.status != 0].all()
    assert (np.isinf(found.parameters) == (found.status == 1))[found.status != 0].all()


def test_sizes_from_losses() -> None:
    law = LossLaw(a=60, alpha=0.3, b=100, beta=0.28, irreducible=0.2)
    sizes = np.array([1e6, 3e7, 7e9])
    found = effective_from_losses(law(sizes, 1e10), law, 1e10, sizes=(1e6, 1e9))
    assert found.parameters == pytest.approx(sizes, rel=1e-9)
    assert found.extrapolated.tolist()[1:] == [False, True]
    # No size reaches what the tokens alone leave.
    best = law(1e300, 1e10)
    edge = effective_from_losses([best * 0.999, best * 1.001], law, 1e10)
    assert edge.status.tolist() == [OutOfRange.ABOVE, 0]
    assert math.isinf(edge.parameters[0]) and math.isfinite(edge.parameters[1])
    with pytest.raises(ValueError, match="losses must be positive"):
        effective_from_losses([0.0], law, 1e10)


def test_out_of_range_is_an_answer() -> None:
    below, above = density(0.25, 1e9, REFERENCE), density(1.0, 1e9, REFERENCE)
    assert (below.out_of_range, below.ratio) == (OutOfRange.BELOW, None)
    assert (above.out_of_range, above.ratio) == (OutOfRange.ABOVE, None)
    # A loss below what its tokens alone leave: no number of parameters reaches it.
    best = REFERENCE.score(REFERENCE.loss(1e300, 1e12))
    assert density(best + 1e-6, 1e9, REFERENCE).out_of_range is OutOfRange.ABOVE
    assert density(best - 1e-6, 1e9, REFERENCE).ratio > 0
    assert density(0.25, 1e9, FAMILY).out_of_range is OutOfRange.BELOW
    assert density(1.0, 1e9, FAMILY).out_of_range is OutOfRange.ABOVE


def test_density_is_one_for_the_reference_itself() -> None:
    for reference in (REFERENCE, FAMILY):
        assert density(reference.expected_score(7e9), 7e9, reference).ratio == pytest.approx(1)
        assert density(reference.expected_score(7e9), 3.5e9, reference).ratio == pytest.approx(2)


TRUTH = Reference(
    LossLaw(a=60, alpha=0.3, b=100, beta=0.28),
    ScoreLaw(c=0.7, gamma=-6.0, l=0.5, d=0.25),
    tokens=1e11,
)


def simulated_ladder(seed: int = 0) -> tuple[dict, dict]:
    """Losses of 36 reference runs and scores at 30 losses, with noise, from TRUTH."""
    draw = np.random.default_rng(seed)
    n = np.repeat(10 ** np.linspace(6.7, 9, 6), 6)
    d = n * np.tile([10, 15, 20, 30, 40, 60], 6)
    loss = TRUTH.loss(n, d) * np.exp(0.003 * draw.normal(size=36))
    at = np.linspace(0.15, 1.2, 30)
    score = np.clip(TRUTH.score(at) + 0.01 * draw.normal(size=30), 0, 1)
    return {"parameters": n, "tokens": d, "loss": loss}, {"loss": at, "score": score}


def test_a_ladder_is_fitted_and_its_intervals_hold_the_truth() -> None:
    runs, scores = simulated_ladder()
    found = fit_reference(runs, scores, tokens=TRUTH.tokens, chance=0.25, draws=200)
    score = TRUTH.expected_score(3e8)
    one = density(score, 3e8, found)
    assert one.ratio == pytest.approx(1, rel=0.2)
    assert one.low < one.ratio < one.high and one.low < 1 < one.high and one.high < 2 * one.low
    wide = density(score, 3e8, found, questions=500)
    assert wide.low < one.low and wide.high > one.high
    assert not one.extrapolated
    assert density(TRUTH.expected_score(5e9), 1e9, found).extrapolated
    assert found.fits["loss"]["units"]["beta"] == "1"
    # At the end of the range the interval reaches out of it, and still is no NaN.
    best = found.score(found.loss(1e300, 1e12))
    edge = density(best - 1e-4, 1e9, found)
    assert edge.high == math.inf and edge.low > 0


def test_a_family_is_fitted() -> None:
    n = [7e9, 13e9, 33e9, 65e9]
    s = [0.351, 0.469, 0.578, 0.634]
    found = fit_reference(family={"parameters": n, "score": s}, chance=0.25, name="LLaMA")
    logit = np.log((np.array(s) - 0.25) / (1 - np.array(s)))
    assert [found.slope, found.intercept] == pytest.approx(np.polyfit(np.log(n), logit, 1))
    for size, score in zip(n, s, strict=True):
        one = density(score, size, found)
        assert one.ratio == pytest.approx(1, rel=0.4) and one.low < one.ratio < one.high
    assert found.sizes == (7e9, 65e9)


def test_family_intervals_are_students() -> None:
    """The half width of ln N̂ at the middle of the line, against the t distribution."""
    draw = np.random.default_rng(3)
    n = 10 ** np.linspace(9, 11, 12)
    logit = 0.8 * np.log(n) - 19 + 0.1 * draw.normal(size=12)
    score = 0.25 + 0.75 / (1 + np.exp(-logit))
    found = fit_reference(family={"parameters": n, "score": score}, chance=0.25, draws=20000)
    one = density(found.expected_score(1e10), 1e10, found)
    residual = logit - found.slope * np.log(n) - found.intercept
    error = math.sqrt(residual @ residual / 10 / 12) / found.slope  # at the mean of ln N
    assert math.log(one.high / one.low) == pytest.approx(2 * 2.228 * error, rel=0.06)


def test_references_survive_a_file() -> None:
    runs, scores = simulated_ladder()
    ladder = fit_reference(runs, scores, chance=0.25, draws=20)
    family = fit_reference(family={"parameters": [1e9, 7e9, 3e10], "score": [0.3, 0.4, 0.6]},
                           chance=0.25, draws=20)  # fmt: skip
    for one in (ladder, family, REFERENCE, FAMILY):
        text = json.dumps(reference_to_dict(one), allow_nan=False)
        again = reference_from_dict(json.loads(text))
        assert again == one
        assert density(0.5, 1e9, again) == density(0.5, 1e9, one)
    with pytest.raises(ValueError, match="unknown kind"):
        reference_from_dict({**json.loads(text), "kind": "spline"})
    with pytest.raises(ValueError, match="not a reference: KeyError 'sizes'"):
        reference_from_dict({})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"score 0 is 60.0: .*percent"):
        density(60.0, 1e9, REFERENCE)
    with pytest.raises(ValueError, match="score 0 is nan: .*leave the model out"):
        density(math.nan, 1e9, REFERENCE)
    with pytest.raises(ValueError, match="parameters must be positive"):
        density(0.5, 0, REFERENCE)
    with pytest.raises(ValueError, match="either runs and scores .* got runs"):
        fit_reference({"parameters": []})
    with pytest.raises(ValueError, match="a family needs chance"):
        fit_reference(family={"parameters": [1, 2], "score": [0.3, 0.4]})
    with pytest.raises(ValueError, match="family model 1 has 2e.09 parameters and score 0.25"):
        fit_reference(family={"parameters": [1e9, 2e9], "score": [0.3, 0.25]}, chance=0.25)
    with pytest.raises(ValueError, match="must score higher with size"):
        fit_reference(family={"parameters": [1e9, 2e9], "score": [0.4, 0.3]}, chance=0.25)
    with pytest.raises(ValueError, match="LossLaw.alpha must be positive"):
        LossLaw(1, -0.3, 1, 0.3)
    with pytest.raises(ValueError, match="ScoreLaw.gamma must be negative"):
        ScoreLaw(0.5, 4.0, 0.3)
    with pytest.raises(ValueError, match="level must lie in"):
        density(0.5, 1e9, REFERENCE, level=95)

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densing import Density, LossLaw, OutOfRange, Reference, ScoreLaw, density

LAWS = st.builds(
    LossLaw,
    a=st.floats(1, 1e4),
    alpha=st.floats(0.1, 0.9),
    b=st.floats(1, 1e4),
    beta=st.floats(0.1, 0.9),
    irreducible=st.floats(0, 2),
)
SCORES = st.builds(
    ScoreLaw,
    c=st.floats(0.1, 1),
    gamma=st.floats(-8, -0.3),
    l=st.floats(0.2, 4),
    d=st.floats(0, 0.4),
)


@given(LAWS, st.floats(6, 12), st.floats(9, 13))
def test_size_survives_the_way_there_and_back(law: LossLaw, log_n: float, log_d: float) -> None:
    n, d = 10**log_n, 10**log_d
    rest = law.a * n**-law.alpha
    back = law.parameters(law(n, d), d)
    # What is lost is the rounding of the sum: eps · L relative to the term that holds N.
    assert back == pytest.approx(n, rel=1e-9 + 1e-15 / law.alpha * law(n, d) / rest)


@given(SCORES, st.floats(0.01, 0.99))
def test_score_survives_the_way_there_and_back(law: ScoreLaw, share: float) -> None:
    score = law.d + share * law.c
    assert law(law.loss(score)) == pytest.approx(score, rel=1e-9)


REFERENCE = Reference(LossLaw(50, 0.3, 400, 0.3, 0.1), ScoreLaw(0.75, -4.0, 0.3, 0.25))


def test_density_of_the_reference_itself_is_one() -> None:
    score = REFERENCE.score(REFERENCE.loss(7e9, REFERENCE.tokens))
    found = density(score, 7e9, REFERENCE)
    assert found.ratio == pytest.approx(1, rel=1e-9)
    assert density(score, 3.5e9, REFERENCE).ratio == pytest.approx(2, rel=1e-9)


def test_a_score_outside_the_reference_says_which_side() -> None:
    assert density(0.25, 1e9, REFERENCE) == Density(1e9, None, None, OutOfRange.BELOW)
    assert density(1.0, 1e9, REFERENCE).out_of_range is OutOfRange.ABOVE
    # Reachable by the sigmoid, not by any number of parameters on these tokens.
    unreachable = REFERENCE.score(REFERENCE.loss.irreducible)
    assert unreachable < 1
    assert density(unreachable, 1e9, REFERENCE).out_of_range is OutOfRange.ABOVE


@given(SCORES, st.floats(-10, 100))
def test_scores_fall_with_loss_and_never_overflow(law: ScoreLaw, loss: float) -> None:
    assert law.d <= law(loss + 0.1) <= law(loss) <= law.d + law.c
    assert math.isfinite(law(1e6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreLaw(1, 2, 1), "gamma must be negative"),
        (lambda: ScoreLaw(0, -2, 1), "c must be positive"),
        (lambda: LossLaw(1, -0.1, 1, 0.1), "alpha must be positive"),
        (lambda: LossLaw(1, 0.1, 1, 0.1, -1), "irreducible must be at least 0"),
        (lambda: density(63.4, 1e9, REFERENCE), "percent"),
        (lambda: density(math.nan, 1e9, REFERENCE), "fraction"),
        (lambda: density(0.5, 0, REFERENCE), "parameters must be positive"),
        (lambda: REFERENCE.loss(1e9, -1), "tokens must be positive"),
        (lambda: REFERENCE.score.loss(math.nan), "score is NaN"),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

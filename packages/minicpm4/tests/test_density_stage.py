"""Stage `density` without its training: what it refuses, and where a ladder puts a model."""

from __future__ import annotations

import pytest

from minicpm4.stages.density import DensityStageConfig, check
from minicpm4.stages.ladder import REACH, place

CONFIG = DensityStageConfig(widths=[32, 64], steps=[10, 20, 40], resamples=50)


def law(n: float, d: float) -> float:
    return 4.0 * n**-0.1 + 30.0 * d**-0.3


def ladder() -> list[dict[str, float]]:
    return [
        {"parameters": n, "tokens": d, "nats_per_byte": law(n, d)}
        for n in (1e5, 3e5, 1e6)
        for d in (1e5, 3e5, 1e6)
    ]


def own(parameters: float, effective: float) -> dict[str, float]:
    return {"model_parameters": parameters, "nats_per_byte": law(effective, 2e6)}


def test_a_model_is_placed_where_the_ladder_is_as_good() -> None:
    pytest.importorskip("densing")
    models = {"half": own(2e6, 1e6), "far": own(1e6, 1e6 * REACH * 3), "near 0": own(1e4, 3e3)}
    placed = place(ladder(), models, 2e6, CONFIG, 0)
    half, far, near = placed["own"]
    assert half["density"] == pytest.approx(0.5, rel=1e-3) and half["beyond"] is None
    low, high = half["interval"]  # of numbers without noise: a point, but for rounding
    assert low * (1 - 1e-12) <= half["density"] <= high * (1 + 1e-12)
    assert (far["beyond"], far["density"], far["interval"]) == ("above", None, None)
    assert (near["beyond"], near["density"]) == ("below", None)
    # Better than the ladder at any size: no effective size at all.
    best = {"model_parameters": 1e6, "nats_per_byte": 0.9 * 30.0 * 2e6**-0.3}
    assert place(ladder(), {"best": best}, 2e6, CONFIG, 0)["own"][0]["beyond"] == "above"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"widths": [32, 40]}, "40 is not a multiple of 32"),
        ({"widths": [32, 64], "steps": [10, 20]}, "at least 5"),
        ({"steps": [10, 10, 20]}, "steps: expected different values"),
    ],
)
def test_a_ladder_that_cannot_be_fitted_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(DensityStageConfig(**keys))

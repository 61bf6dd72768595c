"""WSD against its closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minicpm4.schedule import WSD


@pytest.mark.parametrize(("total", "warmup", "fraction"), [(100, 10, 0.2), (7, 0, 0.5), (10, 3, 0)])
@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_three_parts(total: int, warmup: int, fraction: float, shape: str) -> None:
    wsd = WSD(0.01, total, warmup, fraction, final_ratio=0.1, shape=shape)
    decay = round(total * fraction)
    start = total - decay
    assert wsd.decay_start == start
    for step in range(total):
        if step < warmup:
            wanted = 0.01 * (step + 1) / warmup
        elif step < start:
            wanted = 0.01
        elif shape == "linear":
            wanted = 0.01 * (1 - 0.9 * (step + 1 - start) / decay)
        else:
            # The paper's f(s) = 0.5^((s - S) / T), T the half-life that ends at a tenth.
            half_life = decay * math.log(2) / math.log(10)
            wanted = 0.01 * 0.5 ** ((step + 1 - start) / half_life)
        assert wsd(step) == pytest.approx(wanted, rel=1e-12)
    assert wsd(total - 1) == pytest.approx(0.001 if decay else 0.01)


def test_a_run_can_be_branched_at_the_start_of_its_decay() -> None:
    """Two lengths share every step before the shorter one's decay: one trunk, many decays."""
    short, long = WSD(0.01, 100, 10, 0.2), WSD(0.01, 400, 10, 0.2)
    assert [short(s) for s in range(80)] == [long(s) for s in range(80)]
    assert short(80) < long(80)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"decay_fraction": 1.1}, "decay_fraction must be in 0..1"),
        ({"final_ratio": 0.0}, r"final_ratio must be in \(0, 1\]"),
        ({"shape": "cosine"}, "shape must be 'exponential' or 'linear', got 'cosine'"),
        ({"warmup_steps": 95}, "warmup_steps 95 must lie before the decay, .* step 90 of 100"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
    ],
)
def test_what_makes_no_schedule_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WSD(**{"lr": 0.01, "total_steps": 100, **fields})


@pytest.mark.parametrize("step", [-1, 100])
def test_no_rate_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match=r"step must be in 0\.\.99"):
        WSD(0.01, 100)(step)

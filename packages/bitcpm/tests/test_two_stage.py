from __future__ import annotations

import pytest

from bitcpm import TwoStage, TwoStageConfig

CONFIG = TwoStageConfig(warmup_steps=10, rewarmup_steps=5)


def test_closed_form_of_the_papers_recipe():
    schedule = TwoStage(200, CONFIG)
    assert (schedule.switch_step, schedule.decay_step) == (120, 160)
    for step in range(200):
        phase, lr, part = schedule(step)
        if step < 10:
            expected = ("full_precision", 1e-2 * (step + 1) / 10, "warmup")
        elif step < 120:
            expected = ("full_precision", 1e-2, "stable")
        elif step < 125:
            expected = ("qat", 5e-3 * (step - 119) / 5, "warmup")
        elif step < 160:
            expected = ("qat", 5e-3, "stable")
        else:
            expected = ("qat", 5e-3 * 10 ** (-(step - 159) / 40), "decay")
        assert (phase, part) == (expected[0], expected[2])
        assert lr == pytest.approx(expected[1], rel=1e-12)
    assert schedule(199).lr == pytest.approx(5e-4)


@pytest.mark.parametrize("total", (1, 2, 7, 1000, 12345))
@pytest.mark.parametrize("share", (0.4, 0.7, 1.0))
def test_every_step_has_a_positive_rate_and_the_phases_do_not_mix(total, share):
    config = TwoStageConfig(qat_fraction=share, warmup_steps=0, rewarmup_steps=0)
    schedule = TwoStage(total, config)
    steps = [schedule(step) for step in range(total)]
    assert all(0 < s.lr <= config.lr for s in steps)
    phases = [s.phase for s in steps]
    assert phases == ["full_precision"] * schedule.switch_step + ["qat"] * (
        total - schedule.switch_step
    )
    assert abs((total - schedule.switch_step) - share * total) <= 0.5 or total == 1


def test_qat_from_scratch_uses_the_rewarmup_only():
    schedule = TwoStage(100, TwoStageConfig(qat_fraction=1.0, warmup_steps=90, rewarmup_steps=4))
    assert [schedule(s).lr for s in range(5)] == pytest.approx(
        [1.25e-3, 2.5e-3, 3.75e-3, 5e-3, 5e-3]
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(qat_fraction=0.3), "less than twice decay_fraction"),
        (dict(qat_fraction=0.0), "qat_fraction must be > 0"),
        (dict(qat_fraction=1.1), "qat_fraction must be > 0 and <= 1"),
        (dict(decay_fraction=1.0, qat_fraction=1.0), "decay_fraction must be < 1"),
        (dict(lr=float("nan")), "lr must be > 0"),
        (dict(lr=-1.0), "lr must be > 0"),
        (dict(qat_lr_ratio=0.0), "qat_lr_ratio must be > 0"),
        (dict(final_lr_ratio=2.0), "final_lr_ratio must be"),
        (dict(warmup_steps=-1), "warmup_steps must be a whole number"),
        (dict(rewarmup_steps=1.5), "rewarmup_steps must be a whole number"),
    ],
)
def test_config_is_validated(fields, match):
    with pytest.raises(ValueError, match=match):
        TwoStageConfig(**fields)


def test_ablation_may_shorten_qat():
    config = TwoStageConfig(
        qat_fraction=0.1, decay_fraction=0.08, allow_short_qat=True, rewarmup_steps=2
    )
    assert TwoStage(1000, config).switch_step == 900


def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="warmup_steps 100 do not fit in the first stage's 60"):
        TwoStage(100)
    with pytest.raises(ValueError, match="rewarmup_steps 30 do not fit between the switch"):
        TwoStage(100, TwoStageConfig(warmup_steps=5, rewarmup_steps=30))
    with pytest.raises(ValueError, match="total_steps must be a whole number >= 1"):
        TwoStage(0)
    with pytest.raises(ValueError, match=r"step must be in \[0, 200\), got 200"):
        TwoStage(200, CONFIG)(200)
    with pytest.raises(ValueError, match="got -1"):
        TwoStage(200, CONFIG)(-1)

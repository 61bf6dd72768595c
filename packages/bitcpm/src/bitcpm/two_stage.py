"""The two-stage schedule: full precision first, then ternary QAT. MiniCPM4 report §3.3.

    rate
    lr      |    ______________
            |   /              |
    qat_lr  |  /               |   ________
            | /                |  /        \\
            |/                 | /          \\__
            +------------------+----------------> step
             warm-up  stable     re-   stable decay
             full precision      warm-up  QAT

A function of the step and nothing else: a run that resumes needs no state but its step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .config import TwoStageConfig

Phase = Literal["full_precision", "qat"]
Part = Literal["warmup", "stable", "decay"]


class ScheduledStep(NamedTuple):
    """What one optimiser step uses: the phase, the learning rate, and the part of the phase."""

    phase: Phase
    lr: float
    part: Part


class TwoStage:
    """Maps a step in [0, total_steps) to its phase and learning rate.

    With W warm-up steps the k-th step of a phase (from 0) runs at peak * (k + 1) / W while k < W,
    then at the peak. In the last `decay_fraction` of all steps, D of them, the k-th runs at
    peak * final_lr_ratio ** ((k + 1) / D).

    Args:
        total_steps: optimiser steps of both stages together, >= 1.
        config: defaults to TwoStageConfig().

    Attributes:
        switch_step: the first QAT step: call `ternarize` before it.
        decay_step: the first step of the decay.

    Raises:
        ValueError: the steps do not hold the warm-ups, or the decay would begin before QAT's rate
            is up.
    """

    def __init__(self, total_steps: int, config: TwoStageConfig | None = None) -> None:
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number >= 1, got {total_steps!r}")
        self.total_steps = total_steps
        self.config = config or TwoStageConfig()
        qat_steps = max(1, round(total_steps * self.config.qat_fraction))
        decay_steps = max(1, round(total_steps * self.config.decay_fraction))
        self.switch_step = total_steps - qat_steps
        self.decay_step = total_steps - decay_steps
        # A run of QAT alone has no first stage to warm up.
        if self.switch_step and self.config.warmup_steps > self.switch_step:
            raise ValueError(
                f"warmup_steps {self.config.warmup_steps} do not fit in the first stage's "
                f"{self.switch_step} of {total_steps} steps: lower warmup_steps"
            )
        if self.switch_step + self.config.rewarmup_steps > self.decay_step:
            raise ValueError(
                f"rewarmup_steps {self.config.rewarmup_steps} do not fit between the switch to QAT "
                f"at step {self.switch_step} and the decay at step {self.decay_step}: lower "
                "rewarmup_steps or decay_fraction, or raise qat_fraction"
            )

    def __call__(self, step: int) -> ScheduledStep:
        """The phase and rate of `step`.

        Raises:
            ValueError: `step` is outside [0, total_steps).
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step must be in [0, {self.total_steps}), got {step}")
        config = self.config
        if step < self.switch_step:
            phase, first, warmup, peak = "full_precision", 0, config.warmup_steps, config.lr
        else:
            phase, first, warmup = "qat", self.switch_step, config.rewarmup_steps
            peak = config.lr * config.qat_lr_ratio
        if step - first < warmup:
            return ScheduledStep(phase, peak * (step - first + 1) / warmup, "warmup")
        if step < self.decay_step:
            return ScheduledStep(phase, peak, "stable")
        done = (step - self.decay_step + 1) / (self.total_steps - self.decay_step)
        return ScheduledStep(phase, peak * config.final_lr_ratio**done, "decay")

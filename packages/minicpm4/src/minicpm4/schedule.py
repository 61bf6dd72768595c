"""Warm-up – Stable – Decay: the learning rate as a function of the step. arXiv 2404.06395 §4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WSD:
    """Linear warm-up to `lr`, then constant, then decay to `lr * final_ratio`.

    A function of the step and nothing else, so a run that resumes needs only its step. Because the
    stable part has no end built in, one run can be branched: decay it here, go on with it there.

    Args:
        lr: peak learning rate, > 0.
        total_steps: all steps, >= 1.
        warmup_steps: the k-th step (from 0) runs at lr * (k + 1) / warmup_steps.
        decay_fraction: share of all steps in the decay, 0..1; MiniCPM found 0.1 enough.
        final_ratio: last rate divided by the peak, in (0, 1].
        shape: `exponential` as in the paper, or `linear`.

    Raises:
        ValueError: a value out of range, or warm-up and decay that overlap.
    """

    lr: float
    total_steps: int
    warmup_steps: int = 0
    decay_fraction: float = 0.1
    final_ratio: float = 0.1
    shape: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self) -> None:
        """Refuse what makes no schedule."""
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in 0..1, got {self.decay_fraction}")
        if not 0 < self.final_ratio <= 1:
            raise ValueError(f"final_ratio must be in (0, 1], got {self.final_ratio}")
        if self.shape not in ("exponential", "linear"):
            raise ValueError(f"shape must be 'exponential' or 'linear', got {self.shape!r}")
        if not 0 <= self.warmup_steps <= self.decay_start:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must lie before the decay, which starts at step "
                f"{self.decay_start} of {self.total_steps}"
            )

    @property
    def decay_start(self) -> int:
        """The first step of the decay."""
        return self.total_steps - round(self.total_steps * self.decay_fraction)

    def __call__(self, step: int) -> float:
        """Learning rate of `step`, in 0..total_steps-1; ValueError outside."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step must be in 0..{self.total_steps - 1}, got {step}")
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if step < self.decay_start:
            return self.lr
        done = (step + 1 - self.decay_start) / (self.total_steps - self.decay_start)
        if self.shape == "linear":
            return self.lr * (1 + (self.final_ratio - 1) * done)
        return self.lr * self.final_ratio**done

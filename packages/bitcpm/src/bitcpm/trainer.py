"""The two-stage recipe as a `transformers.Trainer`: MiniCPM4 report §3.3, BitCPM-CANN §3.

Full precision first; at `TwoStage.switch_step` the decoder's linear layers become ternary, in
place, and the learning rate warms up again. Parameters stay the same objects, so whatever wraps
them (accelerate, DDP, DeepSpeed ZeRO up to stage 2) goes on working. A checkpoint holds the latent
weights of a plain model; a run that resumes is ternary where it has to be.

BitCPM-CANN's third step is decoupled distillation: QAT first, then a teacher's logits.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from .config import TernaryConfig, TwoStageConfig
from .qat import ternarize, ternary_layers
from .stats import quantisation_stats
from .two_stage import TwoStage


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """A teacher's share of the loss: BitCPM-CANN §3.3.

    Args:
        begin: share of all steps after which the teacher is asked, in [0, 1). Decoupled: well after
            the switch to QAT. 0: distillation throughout ("joint").
        weight: of the teacher's term, in (0, 1]; the labels' has 1 - weight.
        temperature: of both distributions, > 0.
    """

    begin: float = 0.8
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < 1:
            raise ValueError(f"begin must be in [0, 1), got {self.begin!r}")
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be in (0, 1], got {self.weight!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}")


class TwoStageTrainer(Trainer):
    """A `transformers.Trainer` that trains in two stages and logs what the weights do.

    Every log line of the second stage has `ternary_zeros`, `ternary_flips_per_step` (share of codes
    that changed, over the steps since the last line) and `ternary_scale_drift` (relative change of
    the scales since then), as means over the layers.

    Args:
        ternary: the quantiser; defaults to TernaryConfig().
        two_stage: shares and ratios of the schedule; its `lr` is not read, the peak of the first
            stage is `args.learning_rate`. Defaults to TwoStageConfig().
        teacher: a model with the same vocabulary, or None.
        distillation: when and how the teacher counts; defaults to DistillationConfig().
        *args, **kwargs: those of `transformers.Trainer`. `args.lr_scheduler_type` and
            `args.warmup_steps` are not read.
    """

    def __init__(
        self,
        *args: Any,
        ternary: TernaryConfig | None = None,
        two_stage: TwoStageConfig | None = None,
        teacher: nn.Module | None = None,
        distillation: DistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.ternary = ternary or TernaryConfig()
        self.two_stage = two_stage or TwoStageConfig()
        self.distillation = distillation or DistillationConfig()
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.schedule: TwoStage | None = None
        self._last_logged = 0
        self.add_callback(_Switch(self))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The two-stage schedule, relative to the optimiser's own rate."""
        if self.lr_scheduler is None:
            schedule = self.schedule = TwoStage(num_training_steps, self.two_stage)

            def factor(step: int) -> float:
                # The scheduler also asks for the step after the last one.
                return schedule(min(step, schedule.total_steps - 1)).lr / self.two_stage.lr

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The labels' loss, and the teacher's where it is its turn."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.teacher is not None and model.training and self._teacher_counts():
            self.teacher.to(loss.device)
            with torch.no_grad():
                given = {k: v for k, v in inputs.items() if k not in ("labels", "num_items")}
                wanted = self.teacher(**given).logits
            weight = self.distillation.weight
            theirs = distillation_loss(
                outputs["logits"], wanted, inputs["labels"], self.distillation.temperature
            )
            loss = (1 - weight) * loss + weight * theirs
        return (loss, outputs) if return_outputs else loss

    def _teacher_counts(self) -> bool:
        total = self.schedule.total_steps if self.schedule else 0
        return self.state.global_step >= self.distillation.begin * total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the ternary weights' statistics to training lines of the second stage."""
        model = self.accelerator.unwrap_model(self.model)
        if "loss" in logs and next(ternary_layers(model), None) is not None:
            logs |= self._statistics(model)
        super().log(logs, *args, **kwargs)

    def _statistics(self, model: nn.Module) -> dict[str, float]:
        layers = quantisation_stats(model).values()
        steps = max(1, self.state.global_step - self._last_logged)
        self._last_logged = self.state.global_step
        found = {"ternary_zeros": _mean([s.zero_share for s in layers])}
        if all(s.flip_share is not None for s in layers):
            flips, drifts = [s.flip_share for s in layers], [s.scale_drift for s in layers]
            found["ternary_flips_per_step"] = _mean(flips) / steps
            found["ternary_scale_drift"] = _mean(drifts)
        return found


class _Switch(TrainerCallback):
    """Makes the model ternary before the first step of the second stage, also after a resume."""

    def __init__(self, trainer: TwoStageTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer.schedule is not None, "Trainer makes the scheduler before the first step"
        if state.global_step < trainer.schedule.switch_step:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        if next(ternary_layers(model), None) is None:
            ternarize(model, trainer.ternary)


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean KL(teacher || student) over the positions whose next token has a label, times T^2.

    Args:
        student: logits [B, S, V].
        teacher: logits [B, S, V].
        labels: [B, S]; -100 where there is none.
        temperature: > 0.

    Raises:
        ValueError: the vocabularies differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one vocabulary: got logits {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    counts = labels[:, 1:] != -100
    log_p = F.log_softmax(teacher[:, :-1].float() / temperature, -1)
    log_q = F.log_softmax(student[:, :-1].float() / temperature, -1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (divergence * counts).sum() / counts.sum().clamp(min=1) * temperature**2


def leave_process_group() -> None:
    """Ends torch.distributed's default group and its threads: the last call of a program.

    Gloo's threads free the tensors of a collective after its wait has returned. One that does so
    while Python shuts down aborts the process, although everything is written (about one run in
    thirty, with two processes). The threads end with the last reference to the group, and a DDP
    model has one: call this where no trainer and no such model is in use any more.
    """
    gc.collect()  # a trainer and its callbacks refer to each other
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def zero_config() -> Path:
    """Path of the DeepSpeed configuration that ships, for `TrainingArguments(deepspeed=...)`.

    ZeRO stage 2. Stage 3 keeps only a shard of each matrix between steps, and the switch to ternary
    and the statistics look at whole ones.
    """
    return Path(str(files("bitcpm") / "configs" / "zero2.json"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

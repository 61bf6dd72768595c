"""A small trainer that ends with the same weights however often it was killed.

What makes that true: batches are a function of (seed, step), the schedule is a function of the
step, checkpoints hold weights and both moments of AdamW bit for bit, the log is cut back to the
checkpoint on resume, and Ctrl-C waits for the step to be whole. It holds on the CPU for a fixed
number of threads and a model without dropout.

µP: matrices inside the layers learn at lr / (hidden_size / dim_model_base) (MiniCPM, arXiv
2404.06395, table 2).
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minicpm4 import checkpoint
from minicpm4.checkpoint import load_weights
from minicpm4.data import TokenData

__all__ = [
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_weights",
    "parameter_groups",
    "train",
]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train on and at which rate are arguments of `train`.

    Args:
        batch_size: windows in one forward pass.
        length: tokens predicted in one window.
        accumulation: forward passes in one optimiser step.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's moments.
        clip: largest gradient norm; larger gradients are scaled down to it.
        eval_every: steps between validations; the last step always validates.
        eval_windows: windows of one validation.
        checkpoint_seconds: a kill loses at most this much work.
        bf16: autocast matrix products to bfloat16; weights and moments stay fp32.
        seed: of the batches.
    """

    batch_size: int = 16
    length: int = 256
    accumulation: int = 1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_every: int = 50
    eval_windows: int = 64
    checkpoint_seconds: float = 20.0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        for name in ("batch_size", "length", "accumulation", "eval_every", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its log, and how fast it went."""

    log: Path
    validation: list[dict[str, float]]
    tokens_per_second: float


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices of the layers at the µP rate, all else at the full one.

    `lr_scale` multiplies the schedule's rate. Norm weights and biases are not decayed.
    """
    ratio = getattr(model.config, "width_ratio", 1.0)
    edges = {
        id(p)
        for e in (model.get_input_embeddings(), model.get_output_embeddings())
        if e is not None
        for p in e.parameters()
    }
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        matrix = parameter.ndim >= 2
        hidden = matrix and id(parameter) not in edges
        key = (1.0 / ratio if hidden else 1.0, weight_decay if matrix else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def train(
    model: nn.Module,
    data: TokenData,
    validation: TokenData,
    schedule: Callable[[int], float],
    steps: int,
    config: TrainConfig,
    out: Path,
    *,
    first_step: int = 0,
    branch_at: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainResult:
    """Train `model` in place from `first_step` to `steps`, going on from a checkpoint in `out`.

    Args:
        model: a causal language model whose forward takes `input_ids` and gives `logits`.
        data: training tokens.
        validation: tokens never trained on.
        schedule: step -> learning rate.
        steps: the step to stop before.
        config: sizes and AdamW's settings.
        out: folder of `log.jsonl`, checkpoints while running, and `branch/` if asked for.
        first_step: the step that `model` has been trained up to, by another run.
        branch_at: after this many steps, weights are also saved to `out/branch.safetensors`, for a
            run that goes on from there another way.
        on_step: called with (steps done, training loss).

    Returns:
        the log and the validation curve; loss in nats per token, and per byte of text.

    Raises:
        ValueError: the loss or its gradient became NaN or infinite, or `out` holds a checkpoint of
            a run with another `config`.
        KeyboardInterrupt: Ctrl-C, or raised by `on_step`; passed on after a checkpoint was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=0.0, betas=config.betas, fused=True
    )
    settings = {k: v for k, v in asdict(config).items() if k != "checkpoint_seconds"}
    settings["betas"] = list(config.betas)
    log_path = out / "log.jsonl"
    step = checkpoint.resume(model, optimizer, out, first_step, settings)
    history = checkpoint.cut_log(log_path, step)
    began, saved, seen = time.monotonic(), time.monotonic(), 0
    model.train()
    with log_path.open("a", encoding="utf-8") as log, _interrupts_wait() as interrupted:
        while step < steps:
            loss, norm = _step(model, optimizer, data, schedule(step), config, step)
            step += 1
            seen += config.batch_size * config.accumulation * config.length
            row = {"step": step, "lr": schedule(step - 1), "loss": loss, "grad_norm": norm}
            if step % config.eval_every == 0 or step == steps:
                row["validation"] = evaluate(model, validation, config)
            log.write(json.dumps(row) + "\n")
            log.flush()
            history.append(row)
            if step == branch_at:
                checkpoint.save_tensors(out / "branch.safetensors", checkpoint.weights(model))
            try:
                on_step(step, loss)
                if interrupted():
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                checkpoint.save(model, optimizer, out, step, settings)
                raise
            if time.monotonic() - saved > config.checkpoint_seconds and step < steps:
                checkpoint.save(model, optimizer, out, step, settings)
                saved = time.monotonic()
    # The finished weights count as the last checkpoint until the caller has saved them its own way.
    checkpoint.save(model, optimizer, out, step, settings)
    model.eval()
    bytes_per_token = validation.bytes / len(validation)
    curve = [
        {
            "step": row["step"],
            "loss": row["validation"],
            "per_byte": row["validation"] / bytes_per_token,
        }
        for row in history
        if "validation" in row
    ]
    seconds = time.monotonic() - began
    return TrainResult(log_path, curve, seen / seconds if seen else math.nan)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C; the function yielded says whether one came.

    An interrupt between the optimiser's update and the step's count would leave a checkpoint whose
    weights are one step ahead. A second Ctrl-C ends at once, without a checkpoint. Only the main
    thread can do this; in others nothing changes.
    """
    came = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TokenData,
    lr: float,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """One optimiser step; returns (mean loss, gradient norm before clipping)."""
    total = 0.0
    # First, not last: gradients of a step that raised must not join the next one's.
    optimizer.zero_grad(set_to_none=True)
    batch = data.batch(config.seed, step, config.batch_size * config.accumulation, config.length)
    for part in torch.from_numpy(batch).split(config.batch_size):
        loss = _loss(model, part, config.bf16)
        (loss / config.accumulation).backward()
        total += loss.item() / config.accumulation
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    # Before the optimiser sees it: the weights, and the next checkpoint, stay good.
    for name, value in (("loss", total), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} is {value} at step {step + 1} (learning rate {lr:.2g}): lower lr, "
                "lengthen the warm-up, or look for broken text in the data"
            )
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    return total, norm


def _loss(model: nn.Module, window: Tensor, bf16: bool) -> Tensor:
    """Mean nats per token of predicting window[:, 1:]."""
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with autocast:
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), window[:, 1:].reshape(-1)
    )


@torch.no_grad()
def evaluate(model: nn.Module, data: TokenData, config: TrainConfig) -> float:
    """Mean nats per token over `config.eval_windows` evenly spread windows."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in data.windows(config.eval_windows, config.batch_size, config.length):
        total += _loss(model, torch.from_numpy(batch), config.bf16).item() * len(batch)
        count += len(batch)
    model.train(training)
    return total / count

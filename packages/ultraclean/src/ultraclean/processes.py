"""The processes that train one model: this one alone, or those that torchrun or accelerate started.

Every process draws the whole batch and takes its share by position, so that together they see the
tokens that one alone would see, whatever their number; gradients are means over all of them. Rank 0
alone writes, and what it finds on disk is what all go by, so a run goes on with another number.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
CLIP = 1.0  # most of the gradient's norm; also in configs/zero2.json


class Alone:
    """One process.

    Attributes:
        rank, count: which of how many.
        casts: whether weights are fp32 and the training loop casts to bfloat16 on a GPU.
    """

    rank, count, casts = 0, 1, True

    @property
    def writes(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of all."""
        return rows[self.rank :: self.count]

    def agree(self, ask: Callable[[], T]) -> T:
        """What `ask` answers on rank 0."""
        return ask()

    def total(self, *values: float) -> list[float]:
        """Sums over the processes."""
        return list(values)

    def prepare(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, rows: int, passes: int
    ) -> tuple[Any, Any]:
        """(model, optimiser) to train with, in `passes` of `rows` windows for each step."""
        self._passes = passes
        return model, optimiser

    def one_pass(self, model: Any) -> AbstractContextManager[Any]:
        """Around a pass: gradients are exchanged in the last of a step only."""
        return nullcontext()

    def update(self, model: Any, optimiser: Any, loss: torch.Tensor, last: bool) -> None:
        """Add a pass's gradient of its mean loss; after a step's last pass, make the step."""
        import torch

        (loss / self._passes).backward()
        if last:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def release(self) -> None:
        """The model is trained: forget what `prepare` made."""

    def leave(self) -> None:
        """The last call of a program; see `Together.leave`."""


class Together(Alone):
    """The processes of accelerate: DDP, or DeepSpeed where accelerate was told so.

    Raises:
        ValueError: DeepSpeed's ZeRO stage 3, or accelerate made no group of the processes.
    """

    def __init__(self) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        deepspeed = _deepspeed()
        # DDP keeps fp32 weights and the loop casts; DeepSpeed casts the weights itself.
        self.casts = not deepspeed
        gpu = torch.cuda.is_available()
        self._accelerator = Accelerator(
            # Without these two, accelerate would start no group where there is no GPU.
            cpu=not gpu and not deepspeed,
            kwargs_handlers=[InitProcessGroupKwargs(
                backend=None if gpu else "gloo",
                # While one process trains a classifier or writes a model, the others wait.
                timeout=timedelta(hours=6),
            )],
            mixed_precision="bf16" if gpu and deepspeed else "no",
        )  # fmt: skip
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        if self.count != _world():
            raise ValueError(
                f"WORLD_SIZE says {_world()} processes and accelerate found {self.count}, so that "
                "each would train the whole alone: start them by torchrun"
            )
        self._plugin = self._accelerator.state.deepspeed_plugin if deepspeed else None
        if self._plugin is not None and self._plugin.zero_stage == 3:
            raise ValueError(
                "ZeRO stage 3 keeps a shard of each weight, and an arm is judged by whole ones: "
                f"use stage 2, as in {zero_config()}"
            )

    def agree(self, ask: Callable[[], T]) -> T:
        """What `ask` answers on rank 0, which alone is asked; others wait for it."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([ask() if self.writes else None])[0]

    def total(self, *values: float) -> list[float]:
        """Sums over the processes, in fp64."""
        import torch

        sums = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        return self._accelerator.reduce(sums, "sum").tolist()

    def prepare(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, rows: int, passes: int
    ) -> tuple[Any, Any]:
        """The model trains in place."""
        self._accelerator.gradient_accumulation_steps = passes
        self._accelerator.step = 0
        if self._plugin is not None:
            self._plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": rows,
                "gradient_accumulation_steps": passes,
                "train_batch_size": rows * passes * self.count,
            }
        return self._accelerator.prepare(model, optimiser)

    def one_pass(self, model: Any) -> AbstractContextManager[Any]:
        """Around a pass."""
        return self._accelerator.accumulate(model)

    def update(self, model: Any, optimiser: Any, loss: torch.Tensor, last: bool) -> None:
        """DeepSpeed makes its step within `backward`, where it also clips."""
        self._accelerator.backward(loss)
        if last:
            self._accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()

    def release(self) -> None:
        """DDP's hooks and DeepSpeed's engine go; the next arm brings its own."""
        self._accelerator.free_memory()
        gc.collect()

    def leave(self) -> None:
        """End the group and its threads: the last call of a program.

        Gloo's threads free the tensors of a collective after its wait has returned. One that does
        so while Python shuts down aborts the process, although everything is written.
        """
        gc.collect()
        self._accelerator.end_training()


@functools.cache
def launched() -> Alone:
    """The processes of this run: `Together` where torchrun or accelerate started several.

    Raises:
        ImportError: they did, and accelerate is missing.
    """
    if _world() == 1 and not _deepspeed():
        return Alone()
    try:
        return Together()
    except ImportError as error:
        raise ImportError(
            f"several processes train one model by accelerate ({error}): "
            "pip install 'minicpm4-ultraclean[verify]', and deepspeed where you asked for it"
        ) from error


def zero_config() -> Path:
    """DeepSpeed's configuration that ships: ZeRO stage 2.

    `accelerate launch --use_deepspeed --deepspeed_config_file FILE -m ultraclean.cli verify …`
    """
    return Path(str(files("ultraclean") / "configs" / "zero2.json"))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"

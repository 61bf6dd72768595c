"""A small two-stage run with `TwoStageTrainer`; as a program, one process of several."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from bitcpm_models import build
from transformers import TrainingArguments

from bitcpm import TernaryConfig, TwoStageConfig
from bitcpm.trainer import TwoStageTrainer, leave_process_group, zero_config

SCHEDULE = TwoStageConfig(qat_fraction=0.5, decay_fraction=0.2, warmup_steps=2, rewarmup_steps=2)


class Text(torch.utils.data.Dataset):
    """Blocks of a pattern with noise, which a tiny model learns a little of."""

    def __init__(self, blocks: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, 90, (blocks, 1), generator=generator)
        self.tokens = (start + torch.arange(16) * 3) % 90

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def trainer(folder: Path, steps: int = 20, **options) -> TwoStageTrainer:
    arguments = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3,
        logging_steps=2, save_steps=7, save_strategy="steps", report_to=[], use_cpu=True, seed=1,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    extra = {k: options.pop(k) for k in list(options) if k in TrainingArguments.__annotations__}
    return TwoStageTrainer(
        build("llama"), TrainingArguments(**arguments | extra), train_dataset=Text(),
        ternary=TernaryConfig(group_size=16), two_stage=SCHEDULE, **options,
    )  # fmt: skip


def run_one_of_several(folder: Path, **options) -> None:
    """Train with the other processes and write what this one has in the end."""
    run = trainer(folder, steps=6, save_strategy="no", **options)
    run.train()
    model = run.accelerator.unwrap_model(run.model)
    torch.save(
        {
            "count": run.args.world_size,
            "engine": type(run.model_wrapped).__name__,
            "state": {name: value.detach().clone() for name, value in model.state_dict().items()},
            "logs": run.state.log_history,
        },
        folder / f"rank{run.args.process_index}.pt",
    )


def threads() -> list[str]:
    """Names of this process's threads, where the system tells."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    zero = {"deepspeed": str(zero_config())} if "--deepspeed" in sys.argv else {}
    run_one_of_several(folder, per_device_train_batch_size=2, **zero)
    during = threads()
    leave_process_group()
    names = {"during": during, "after": threads()}
    (folder / f"threads{rank}.json").write_text(json.dumps(names))

"""Two-stage training of a model folder on text files: what `bitcpm train` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ._files import atomic_path, write_json
from .checkpoint import copy_companions
from .config import TernaryConfig, TwoStageConfig
from .convert import check_target
from .qat import materialise, ternarize, ternary_layers


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What training did.

    Attributes:
        steps: optimiser steps in all.
        qat_steps: those with ternary weights.
        tokens: trained on, in all steps.
        first_loss, last_loss: of the first and last log line; None if there was none.
        zero_share: share of zeros among the ternary weights in the end.
    """

    steps: int
    qat_steps: int
    tokens: int
    first_loss: float | None
    last_loss: float | None
    zero_share: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self)


class Blocks(Dataset):
    """Text files as token blocks of one length, a file's end marked by the tokenizer's EOS.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is not one whole block.
    """

    def __init__(self, tokenizer: Any, paths: Sequence[str | os.PathLike[str]], length: int):
        tokens: list[int] = []
        for path in paths:
            tokens += tokenizer(Path(path).read_text(encoding="utf-8"))["input_ids"]
            if tokenizer.eos_token_id is not None:
                tokens.append(tokenizer.eos_token_id)
        count = len(tokens) // length
        if not count:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than a block of {length}")
        self.blocks = torch.tensor(tokens[: count * length]).view(count, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def train_model(
    src_dir: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    steps: int,
    ternary: TernaryConfig | None = None,
    two_stage: TwoStageConfig | None = None,
    block: int = 512,
    batch: int = 8,
    teacher_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    bf16: bool = False,
) -> TrainReport:
    """Train a causal LM in two stages and write it with ternary weights.

    Checkpoints go to `<out_dir>.training` and a run that was interrupted goes on from the last one;
    the finished model appears in `out_dir` at once, and the folder of checkpoints stays (it has the
    latent weights).

    Args:
        src_dir: model folder with its tokenizer.
        texts: UTF-8 files.
        out_dir: folder to write; must not exist.
        steps: optimiser steps of both stages.
        ternary: the quantiser; defaults to TernaryConfig().
        two_stage: the schedule; its `lr` is the peak rate. Defaults to TwoStageConfig().
        block: tokens of a sequence, >= 2.
        batch: sequences of a step on each process.
        teacher_dir: model folder whose logits are distilled at the end of QAT, or None.
        seed: of the order of the blocks.
        bf16: autocast to bfloat16.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ImportError: transformers or accelerate is not installed.
        ValueError: a number is out of range; `out_dir` exists or overlaps `src_dir`.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

        from .trainer import TwoStageTrainer
    except ImportError as error:
        raise ImportError(
            f"training needs transformers and accelerate ({error}): "
            "pip install 'minicpm4-bitcpm[train]'"
        ) from None
    for name, value, least in (("steps", steps, 1), ("block", block, 2), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    source, target = Path(src_dir), Path(out_dir)
    check_target(source, target)
    if target.exists():
        raise ValueError(f"{target} exists: name a new folder, or remove it")
    ternary, two_stage = ternary or TernaryConfig(), two_stage or TwoStageConfig()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    teacher = None
    if teacher_dir is not None:
        teacher = AutoModelForCausalLM.from_pretrained(Path(teacher_dir), dtype=torch.float32)
    data = Blocks(AutoTokenizer.from_pretrained(source), texts, block)
    work = target.with_name(target.name + ".training")
    run = TwoStageTrainer(
        model,
        TrainingArguments(
            output_dir=str(work), max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=two_stage.lr, logging_steps=max(1, steps // 50), seed=seed, bf16=bf16,
            save_steps=max(1, steps // 20), save_total_limit=2, report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data, ternary=ternary, two_stage=two_stage, teacher=teacher,
    )  # fmt: skip
    resume = any(work.glob("checkpoint-*/trainer_state.json"))
    run.train(resume_from_checkpoint=resume)
    plain = run.accelerator.unwrap_model(run.model)
    if next(ternary_layers(plain), None) is None:  # resumed after the last step
        ternarize(plain, ternary)
    assert run.schedule is not None, "train() made it"
    lines = [line["loss"] for line in run.state.log_history if "loss" in line]
    layers = [module for _, module in ternary_layers(plain)]
    materialise(plain)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    report = TrainReport(
        steps, steps - run.schedule.switch_step, steps * batch * block * run.args.world_size,
        lines[0] if lines else None, lines[-1] if lines else None,
        zeros / sum(layer.weight.numel() for layer in layers),
    )  # fmt: skip
    if run.is_world_process_zero():
        with atomic_path(target) as folder:
            folder.mkdir()
            copy_companions(source, folder)
            plain.cpu().save_pretrained(folder)
            write_json(folder / "bitcpm_training.json", report.to_dict())
    return report

"""SmolLM2-135M continued to ternary on real text: perplexity against tokens seen.

A model trained in full precision on two trillion tokens is cut to ternary, which ruins it, and then
trained on as QAT (arXiv 2506.07900, section 3.3: the second stage), with its own full-precision
weights as the teacher or without. What a few hundred thousand tokens can win back is little next to
the papers' billions; the curve says how little.

    python packages/bitcpm/experiments/continued.py run --minutes 30
    python packages/bitcpm/experiments/continued.py table

Needs the package testbed. A killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TrainerCallback, TrainingArguments

from bitcpm import TernaryConfig, TwoStageConfig, ternarize
from bitcpm._cli import run as start
from bitcpm.train import Blocks
from bitcpm.trainer import DistillationConfig, TwoStageTrainer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "continued.jsonl"
CORPORA = ("wikipedia", "essays", "news", "reference")
BLOCK, BATCH, HELD_OUT = 512, 4, 32
TERNARY = TernaryConfig(group_size=64)
ARMS = {"labels": None, "teacher": DistillationConfig(begin=0.0, weight=0.9)}

app = typer.Typer(add_completion=False, help=__doc__)


def prepared(tokenizer: Any, work: Path) -> tuple[Blocks, Blocks]:
    """Training and held-out blocks; the latter from everywhere in the test documents."""
    import testbed

    work.mkdir(parents=True, exist_ok=True)
    blocks = []
    for split in ("train", "test"):
        file = work / f"{split}.txt"
        texts = [d.text for name in CORPORA for d in testbed.corpus(name, split)]
        file.write_text("\n\n".join(texts), encoding="utf-8")
        blocks.append(Blocks(tokenizer, [file], BLOCK))
    train, test = blocks
    test.blocks = test.blocks[:: len(test) // HELD_OUT][:HELD_OUT]
    return train, test


@torch.inference_mode()
def held_out(model: Any, test: Blocks) -> float:
    """Mean NLL of the held-out tokens, nats."""
    was = model.training
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(b, labels=b).loss.item() * len(b) for b in test.blocks.split(4)]
    model.train(was)
    return math.fsum(losses) / len(test)


class Watch(TrainerCallback):
    """Writes a line every few steps, and ends the run when its time is over."""

    def __init__(self, arm: str, test: Blocks, every: int, minutes: float, out: Path) -> None:
        import time

        self.arm, self.test, self.every, self.out = arm, test, every, out
        self.now, self.end = time.monotonic, time.monotonic() + 60 * minutes

    def write(self, model: Any, step: int) -> None:
        """One point of the curve."""
        loss = held_out(model, self.test)
        row = {"arm": self.arm, "tokens": step * BLOCK * BATCH, "loss": round(loss, 4),
               "perplexity": round(math.exp(loss), 2)}  # fmt: skip
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """A point, a checkpoint, or the end."""
        if state.global_step % self.every == 0:
            self.write(model, state.global_step)
            control.should_save = True
        if self.now() > self.end:
            control.should_training_stop = True


@app.command()
def run(
    arm: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ARMS)}; all.")] = None,
    steps: Annotated[int, typer.Option(help=f"Of {BLOCK * BATCH} tokens, the whole budget.")] = 300,
    every: Annotated[int, typer.Option(help="Steps between points and checkpoints.")] = 25,
    lr: Annotated[float, typer.Option(help="Peak rate.")] = 1e-3,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    minutes: Annotated[float, typer.Option(help="For each arm; run again to go on.")] = 1e9,
    work: Annotated[Path, typer.Option(help="Checkpoints, 2 GB an arm.")] = Path(
        "runs/bitcpm-continued"
    ),
    out: Annotated[Path, typer.Option(help="The results' file.")] = RESULTS,
) -> None:
    """Train on, and measure before and on the way."""
    import testbed

    torch.set_num_threads(threads)
    for name in arm or ARMS:
        if name not in ARMS:
            raise ValueError(f"unknown arm {name!r}: expected one of {', '.join(ARMS)}")
        model, tokenizer = testbed.smollm2(torch.float32)
        train, test = prepared(tokenizer, work)
        watch = Watch(name, test, every, minutes, out)
        folder = work / name
        teacher = testbed.smollm2(torch.float32)[0] if ARMS[name] else None
        trainer = TwoStageTrainer(
            model,
            TrainingArguments(
                output_dir=str(folder), max_steps=steps, learning_rate=lr, bf16=True, use_cpu=True,
                per_device_train_batch_size=BATCH, adam_beta2=0.95, save_strategy="no",
                save_total_limit=1, logging_steps=every, report_to=[], disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=train, ternary=TERNARY, teacher=teacher, distillation=ARMS[name],
            two_stage=TwoStageConfig(
                qat_fraction=1.0, qat_lr_ratio=1.0, lr=lr, rewarmup_steps=max(1, steps // 20)
            ),
            callbacks=[watch],
        )  # fmt: skip
        resume = any(folder.glob("checkpoint-*/trainer_state.json"))
        if not resume:
            reference, _ = testbed.smollm2(torch.float32)
            watch.arm = "full precision"
            watch.write(reference, 0)
            watch.arm = name
            watch.write(ternarize(reference, TERNARY), 0)
        trainer.train(resume_from_checkpoint=resume)


@app.command()
def table(
    out: Annotated[Path, typer.Option(help="The results' file.")] = RESULTS,
) -> None:
    """Perplexity by tokens, an arm in each column, and the figure beside the results."""
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    points = {(r["arm"], r["tokens"]): r["perplexity"] for r in rows}
    full = points["full precision", 0]
    print(f"full precision: {full}\n\n| tokens | " + " | ".join(ARMS) + " |\n|---|---|---|")
    for tokens in sorted({t for _, t in points}):
        shown = (f"{points[a, tokens]:,.1f}" if (a, tokens) in points else "" for a in ARMS)
        print(f"| {tokens:,} | " + " | ".join(shown) + " |")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.2))
    for name in ARMS:
        curve = sorted((t, p) for (a, t), p in points.items() if a == name and t)
        if curve:
            axis.plot(*zip(*curve, strict=True), "o-", ms=3, label=f"ternary, {name}")
    axis.axhline(full, color="0.6", lw=1, label="full precision")
    axis.set(xlabel="tokens of QAT", ylabel="held-out perplexity", yscale="log")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=110)
    print(f"\n{out.with_suffix('.png')}")


if __name__ == "__main__":
    start(app)

"""The two-stage recipe's choices on a small MiniCPM4: held-out loss by arm, three seeds.

Asks what MiniCPM4's report (arXiv 2506.07900, section 3.3) and BitCPM-CANN (section 3, tables of
grids, groups and distillation) ask, at a small scale: how much of the tokens QAT needs, whether the
rate must warm up again, which group and grid, and when a teacher helps. Every arm of a seed sees
the same batches, and begins with the weights and moments that the full-precision run of that seed
had at the arm's switch: arms differ in nothing but what their name says.

    python packages/bitcpm/experiments/recipe.py run --seed 0 --seed 1 --seed 2
    python packages/bitcpm/experiments/recipe.py table

Needs the packages testbed and minicpm4. Each (arm, seed) is a line of the results file; a killed
run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from bitcpm import TernaryConfig, TwoStage, TwoStageConfig, materialise, ternarize
from bitcpm._cli import run as start
from bitcpm.train import Blocks
from bitcpm.trainer import DistillationConfig, TwoStageTrainer

HERE = Path(__file__).parent
CORPORA = ("wikipedia", "essays", "news", "reference")
FULL, CUT, BASE = "full precision", "full precision, rounded", "base"

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Settings:
    """Sizes of all runs."""

    preset: str = "nano"
    vocabulary: int = 2048
    block: int = 256
    batch: int = 16
    steps: int = 400
    lr: float = 1e-2
    held_out: int = 256

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises, at the start and at the switch."""
        return self.steps // 50


@dataclass(frozen=True)
class Arm:
    """One choice: what differs from the base, 40 % QAT, re-warm-up, g = 64, no teacher.

    The rate decays in the last fifth of all steps, and in the second half of a QAT stage that is
    shorter than twice that (the report's rule).
    """

    share: float = 0.4
    ternary: dict[str, Any] = field(default_factory=dict)
    rewarmup: bool = True
    lr_ratio: float = 0.5
    distillation: DistillationConfig | None = None

    def two_stage(self, settings: Settings) -> TwoStageConfig:
        """The schedule of this arm."""
        return TwoStageConfig(
            qat_fraction=self.share, lr=settings.lr, qat_lr_ratio=self.lr_ratio,
            warmup_steps=settings.warmup, rewarmup_steps=settings.warmup * self.rewarmup,
            decay_fraction=min(0.2, self.share / 2),
        )  # fmt: skip


ARMS: dict[str, Arm] = {
    BASE: Arm(),
    "QAT 10 %": Arm(share=0.1),
    "QAT 20 %": Arm(share=0.2),
    "QAT 60 %": Arm(share=0.6),
    "QAT 80 %": Arm(share=0.8),
    "QAT 100 %": Arm(share=1.0),
    "no re-warm-up": Arm(rewarmup=False),
    "QAT at the full rate": Arm(lr_ratio=1.0),
    "no re-warm-up, full rate": Arm(rewarmup=False, lr_ratio=1.0),
    "g = 32": Arm(ternary={"group_size": 32}),
    "g = 128": Arm(ternary={"group_size": 128}),
    "row": Arm(ternary={"group_size": -1}),
    "five-level": Arm(ternary={"grid": "five-level"}),
    "integer-symmetric": Arm(ternary={"grid": "integer-symmetric"}),
    "half-symmetric": Arm(ternary={"grid": "half-symmetric"}),
    "asymmetric": Arm(ternary={"grid": "asymmetric"}),
    "teacher throughout QAT": Arm(distillation=DistillationConfig(begin=0.6)),
    "teacher at the end": Arm(distillation=DistillationConfig(begin=0.8)),
}
# What the table shows together, each against its first row.
GROUPS: dict[str, tuple[str, ...]] = {
    "share of QAT": ("QAT 100 %", "QAT 80 %", "QAT 60 %", BASE, "QAT 20 %", "QAT 10 %", FULL, CUT),
    "rate": (BASE, "no re-warm-up", "QAT at the full rate", "no re-warm-up, full rate"),
    "group": (BASE, "g = 32", "g = 128", "row"),
    "grid": (BASE, "five-level", "integer-symmetric", "half-symmetric", "asymmetric"),
    "teacher": (BASE, "teacher throughout QAT", "teacher at the end"),
}


def prepared(settings: Settings, work: Path) -> tuple[Blocks, Blocks]:
    """Training and held-out blocks of real text, by a tokenizer learnt from the former."""
    from transformers import AutoTokenizer

    import testbed
    from minicpm4.tokenizer import train_bpe

    folder = work / f"text-{settings.vocabulary}"
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            split: [d.text for name in CORPORA for d in testbed.corpus(name, split)]
            for split in ("train", "test")
        }
        for split, documents in texts.items():
            (folder / f"{split}.txt").write_text("\n\n".join(documents), encoding="utf-8")
        train_bpe(texts["train"], settings.vocabulary).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = (Blocks(tokenizer, [folder / f"{s}.txt"], settings.block)
                   for s in ("train", "test"))  # fmt: skip
    # From everywhere in the held-out text, not from the first corpus alone.
    test.blocks = test.blocks[:: max(1, len(test) // settings.held_out)][: settings.held_out]
    return train, test


def fresh(settings: Settings, seed: int) -> Any:
    """The model with its first weights: the same for every arm of a seed."""
    import minicpm4
    from minicpm4.modeling import MiniCPM4ForCausalLM

    torch.manual_seed(seed)
    return MiniCPM4ForCausalLM(
        minicpm4.preset(settings.preset, vocab_size=settings.vocabulary,
                        max_position_embeddings=settings.block)
    )  # fmt: skip


def arguments(settings: Settings, seed: int, folder: Path) -> TrainingArguments:
    """AdamW as in the quickstart, in float32; checkpoints only where a callback asks for one."""
    return TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, learning_rate=settings.lr, seed=seed,
        per_device_train_batch_size=settings.batch, weight_decay=0.1, adam_beta2=0.95,
        save_strategy="no", logging_steps=50, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip


class SaveAt(TrainerCallback):
    """Checkpoints after the given steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for one."""
        control.should_save = state.global_step in self.steps


def full_precision(settings: Settings, seed: int, data: Blocks, work: Path) -> Any:
    """The run that all arms branch off, to its own end; trained once, checkpoints stay."""
    folder = work / f"seed-{seed}"
    model = fresh(settings, seed)
    switches = {TwoStage(settings.steps, a.two_stage(settings)).switch_step for a in ARMS.values()}
    # A stage that neither changes the rate nor the weights: warm-up, stable, decay.
    plain = TwoStageConfig(lr=settings.lr, qat_lr_ratio=1.0, warmup_steps=settings.warmup,
                           rewarmup_steps=0)  # fmt: skip
    schedule = TwoStage(settings.steps, plain)
    last = folder / f"checkpoint-{settings.steps}"
    if not (last / "trainer_state.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        args = arguments(settings, seed, folder)
        optimizer = _optimizer(model, args)
        rate = LambdaLR(optimizer, lambda s: schedule(min(s, settings.steps - 1)).lr / settings.lr)
        Trainer(
            model, args, train_dataset=data, optimizers=(optimizer, rate),
            callbacks=[SaveAt((switches | {settings.steps}) - {0})],
        ).train()  # fmt: skip
    from safetensors.torch import load_model

    load_model(model, str(last / "model.safetensors"), strict=False)
    return model


def _optimizer(model: Any, args: TrainingArguments) -> torch.optim.Optimizer:
    trainer = Trainer(model, args)
    return trainer.create_optimizer()


def trained(name: str, settings: Settings, seed: int, data: Blocks, work: Path) -> Any:
    """A model in the end of an arm, its weights on the grid."""
    arm = ARMS[name]
    teacher = full_precision(settings, seed, data, work)
    two_stage = arm.two_stage(settings)
    switch = TwoStage(settings.steps, two_stage).switch_step
    scratch = work / f"arm-{seed}"
    run = TwoStageTrainer(
        fresh(settings, seed), arguments(settings, seed, scratch), train_dataset=data,
        ternary=TernaryConfig(**{"group_size": 64, **arm.ternary}), two_stage=two_stage,
        teacher=teacher if arm.distillation else None, distillation=arm.distillation,
    )  # fmt: skip
    begin = str(work / f"seed-{seed}" / f"checkpoint-{switch}") if switch else None
    run.train(resume_from_checkpoint=begin)
    shutil.rmtree(scratch, ignore_errors=True)
    return materialise(run.model)


@torch.inference_mode()
def held_out(model: Any, test: Blocks, batch: int) -> float:
    """Mean NLL of the held-out blocks' tokens, nats."""
    model.eval()
    losses = [model(b, labels=b).loss.item() * len(b) for b in test.blocks.split(batch)]
    return math.fsum(losses) / len(test)


def measured(name: str, settings: Settings, seed: int, data: Blocks, test: Blocks, work: Path):
    """The held-out loss of an arm."""
    if name in (FULL, CUT):
        model = full_precision(settings, seed, data, work)
        if name == CUT:
            materialise(ternarize(model, TernaryConfig(group_size=64)))
    else:
        model = trained(name, settings, seed, data, work)
    return held_out(model, test, settings.batch)


def read(out: Path, settings: Settings) -> dict[str, dict[int, float]]:
    """Loss by arm and seed; whole lines of the results file, made with these settings."""
    found: dict[str, dict[int, float]] = {}
    lines = out.read_text("utf-8").splitlines() if out.exists() else []
    for row in map(json.loads, lines):
        if row["settings"] == dataclasses.asdict(settings):
            found.setdefault(row["arm"], {})[row["seed"]] = row["loss"]
    return found


def against(mine: dict[int, float], base: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of the differences over the seeds that both have."""
    gaps = [mine[s] - base[s] for s in sorted(mine.keys() & base.keys())]
    spread = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return (statistics.mean(gaps) if gaps else math.nan), spread


def tables(found: dict[str, dict[int, float]]) -> str:
    """Markdown: mean loss, and paired differences from each group's first row."""
    lines = []
    for group, names in GROUPS.items():
        lines += [f"\n| {group} | held-out nats | difference | seeds |", "|---|---|---|---|"]
        for name in (n for n in names if n in found):
            mean, error = against(found[name], found.get(names[0], {}))
            known = "" if math.isnan(error) else f" ± {error:.4f}"  # one seed has none
            shown = "" if name == names[0] or math.isnan(mean) else f"{mean:+.4f}{known}"
            value = statistics.mean(found[name].values())
            lines.append(f"| {name} | {value:.4f} | {shown} | {len(found[name])} |")
    return "\n".join(lines)


OUT = Annotated[Path, typer.Option(help="The results' file.")]
RESULTS = HERE / "results" / "recipe.jsonl"


@app.command()
def run(
    seed: Annotated[list[int] | None, typer.Option(help="Repeat it. Default: 0, 1, 2.")] = None,
    steps: Annotated[int, typer.Option(help="Of every run, both stages together.")] = 400,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
    minutes: Annotated[float, typer.Option(help="Start no run later; run again to go on.")] = 1e9,
    work: Annotated[Path, typer.Option(help="Texts and checkpoints.")] = Path("runs/bitcpm-recipe"),
    out: OUT = RESULTS,
) -> None:
    """Train what is missing, a seed after the other."""
    torch.set_num_threads(threads)
    settings = Settings(steps=steps)
    data, test = prepared(settings, work)
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    for number in seed or [0, 1, 2]:
        for name in (FULL, CUT, *ARMS):
            if number in read(out, settings).get(name, {}):
                continue
            if time.monotonic() - began > 60 * minutes:
                print("out of time: run the same command again")
                return
            started = time.monotonic()
            loss = measured(name, settings, number, data, test, work)
            row = {"arm": name, "seed": number, "loss": round(loss, 5),
                   "seconds": round(time.monotonic() - started, 1),
                   "settings": dataclasses.asdict(settings)}  # fmt: skip
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"seed {number}, {name}: {loss:.4f} ({row['seconds']} s)", flush=True)


@app.command()
def table(
    steps: Annotated[int, typer.Option(help="The steps that were run.")] = 400, out: OUT = RESULTS
) -> None:
    """Print the tables, with standard errors over seeds."""
    print(tables(read(out, Settings(steps=steps))))


if __name__ == "__main__":
    start(app)

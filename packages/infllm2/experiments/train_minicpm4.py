"""Train a small MiniCPM4 from scratch: dense, sparse, and switched from dense to sparse late.

The same texts, seeds and steps. `switched` is the dense run up to its switch, optimiser included,
and sparse from there: the paper's recipe, on a small scale. Each model's loss on held-out text is
then measured under both attentions, by position: sparse attention leaves nothing out of the first
blocks of a sequence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from shared import HERE, QUICK, Cells, Later, budget, dense, table

from infllm2 import sparse
from infllm2._cli import run

# Of 32 blocks, a token visits its own, the one before, the first, and three it chooses.
CONFIG = budget(128, 4)
RUNS = ("dense", "sparse", "switched")
COLOURS = {"dense": "k", "sparse": "C0", "switched": "C3"}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Settings:
    """Sizes of the runs; a result file holds those that it was made with."""

    preset: str = "micro"
    length: int = 2048
    batch: int = 2
    steps: int = 250
    switch: int = 200
    lr: float = 1e-2
    warmup: int = 20
    decay: float = 0.2
    eval_every: int = 25
    eval_windows: int = 12
    vocabulary: int = 4096
    corpora: tuple[str, ...] = ("wikipedia", "essays")


def prepared(settings: Settings, work: Path) -> tuple[Any, Any]:
    """Training and held-out tokens, with a tokenizer learnt from the former."""
    import testbed
    from minicpm4.data import TokenData, pack
    from minicpm4.tokenizer import train_bpe

    kind = "-".join(["tokens", str(settings.vocabulary), *settings.corpora])
    folders = [work / kind / split for split in ("train", "test")]
    if not all(folder.exists() for folder in folders):
        texts = {
            split: [d.text for name in settings.corpora for d in testbed.corpus(name, split)]
            for split in ("train", "test")
        }
        tokenizer = train_bpe(texts["train"], settings.vocabulary)
        for folder in folders:
            pack(texts[folder.name], tokenizer, folder)
    train, test = (TokenData(folder) for folder in folders)
    return train, test


def fresh(settings: Settings) -> Any:
    """The model with its first weights: the same for every run."""
    import minicpm4
    from minicpm4.modeling import MiniCPM4ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": settings.vocabulary, "max_position_embeddings": settings.length}
    return MiniCPM4ForCausalLM(minicpm4.preset(settings.preset, **sizes))


def attention(model: Any, mode: str) -> Any:
    """The model with one of both attentions."""
    return sparse(model, CONFIG if mode == "sparse" else dense(CONFIG))


def trained(
    name: str, mode: str, until: int, settings: Settings, cells: Cells, work: Path
) -> dict[str, Any]:
    """Train in `work/<name>` up to a step, going on from what is there; curves of all steps."""
    from minicpm4.schedule import WSD
    from minicpm4.trainer import TrainConfig, train

    data, held_out = prepared(settings, work)
    model = fresh(settings)
    schedule = WSD(settings.lr, settings.steps, settings.warmup, settings.decay, shape="linear")
    config = TrainConfig(
        batch_size=settings.batch,
        length=settings.length,
        eval_every=settings.eval_every,
        eval_windows=settings.eval_windows,
    )

    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0:
            print(f"  {name}: step {step}/{settings.steps}, loss {loss:.3f}", flush=True)
        if cells.late() and step < until:
            raise KeyboardInterrupt

    with attention(model, mode) as trace:
        try:
            result = train(
                model, data, held_out, schedule, until, config, work / name, on_step=on_step
            )
        except KeyboardInterrupt:
            if cells.late():
                raise Later from None
            raise
    rows = [json.loads(line) for line in result.log.read_text("utf-8").splitlines()]
    return {
        "loss": [round(row["loss"], 4) for row in rows],
        "held_out": {row["step"]: round(row["loss"], 4) for row in result.validation},
        "visited": round(trace.visited_share, 4),
        "tokens_per_second": round(result.tokens_per_second),
    }


@torch.inference_mode()
def measured(name: str, mode: str, settings: Settings, work: Path) -> dict[str, Any]:
    """Held-out nats per token under one attention: over all, and by quarter of the window."""
    from minicpm4.checkpoint import load_weights

    _, held_out = prepared(settings, work)
    model = fresh(settings).eval()
    load_weights(model, newest(work / name) / "model.safetensors")
    total, count = torch.zeros(settings.length), 0
    with attention(model, mode):
        for batch in held_out.windows(4 * settings.eval_windows, 4, settings.length):
            window = torch.from_numpy(batch)
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), window[:, 1:], reduction="none"
            )
            total += loss.sum(0)
            count += len(window)
    by_position = total / count
    quarters = by_position.reshape(4, -1).mean(1)
    return {
        "nll": round(by_position.mean().item(), 4),
        "quarters": [round(q, 4) for q in quarters.tolist()],
        "windows": count,
    }


def newest(folder: Path) -> Path:
    """The last checkpoint in a folder."""
    return max(folder.glob("checkpoint-*"))


def branch(settings: Settings, cells: Cells, work: Path) -> dict[str, Any]:
    """The sparse end of the dense run: begins with a copy of its checkpoint and log."""
    folder = work / "switched"
    if not folder.exists():
        scratch = work / "switched.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        name = f"checkpoint-{settings.switch:08d}"
        shutil.copytree(work / "dense" / name, scratch / name)
        shutil.copy(work / "dense" / "log.jsonl", scratch / "log.jsonl")
        scratch.rename(folder)
    return trained("switched", "sparse", settings.steps, settings, cells, work)


def plan(settings: Settings, cells: Cells, work: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and computations of all cells. The branch is taken before the dense run goes on."""
    fixed = (settings, cells, work)
    yield "dense, to the switch", lambda: trained("dense", "dense", settings.switch, *fixed)
    yield "switched", lambda: branch(*fixed)
    yield "dense", lambda: trained("dense", "dense", settings.steps, *fixed)
    yield "sparse", lambda: trained("sparse", "sparse", settings.steps, *fixed)
    for name in RUNS:
        for mode in ("dense", "sparse"):
            args = (name, mode, settings, work)
            yield f"{name} | {mode}", lambda args=args: measured(*args)


def plot(cells: Cells, settings: Settings) -> Path:
    """Left: training loss, smoothed. Right: held-out loss under the attention trained with."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
    width = min(10, settings.steps)
    for name in RUNS:
        cell = cells.cells[name]
        first = settings.switch if name == "switched" else 0
        smooth = np.convolve(cell["loss"], np.ones(width) / width, "valid")
        steps = np.arange(width, settings.steps + 1)
        kept = steps >= first
        axes[0].plot(steps[kept], smooth[kept], COLOURS[name], label=name, lw=1.2)
        points = [(int(s), v) for s, v in cell["held_out"].items() if int(s) >= first]
        axes[1].plot(*zip(*points, strict=True), f"{COLOURS[name]}o-", label=name, lw=1.2, ms=3)
    for axis, title in zip(axes, (f"training, mean of {width} steps", "held out"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="nats per token")
        axis.axvline(settings.switch, color="0.8", lw=1, zorder=0)
        axis.legend(fontsize=8)
    losses = sorted(cells.cells["dense"]["loss"])
    axes[0].set_ylim(losses[0] - 0.2, losses[int(0.9 * (len(losses) - 1))] + 0.4)
    figure.tight_layout()
    return cells.figure(figure)


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Smoke run: four short steps, to runs/.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Holds results/ and figures/; beside this script.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Tokens and checkpoints, 150 MB.")] = Path(
        "runs/infllm2-train"
    ),
    minutes: Annotated[
        float, typer.Option(help="Start no step or cell later than this; run again to go on.")
    ] = 1e9,
) -> None:
    """A small MiniCPM4 trained on encyclopaedia articles and essays with dense attention, with
    InfLLM v2 (window 128 + 4 blocks of 2,048 tokens, a third of the blocks), and switched from one
    to the other for the last fifth. Held-out loss of each under both. Goes on where a killed run
    stopped. Needs the minicpm4 package."""
    settings = Settings()
    if quick:
        settings = Settings(
            preset="nano", length=640, batch=1, steps=4, switch=3, warmup=1, eval_every=2,
            eval_windows=1, vocabulary=512, corpora=("news",),
        )  # fmt: skip
        work = work / "quick"
    cells = Cells("train_minicpm4", out or (QUICK if quick else HERE), asdict(settings), minutes)
    if not cells.fill(plan(settings, cells, work)):
        return
    facts = {name: cell for name, cell in cells.cells.items() if " | " in name}
    cells.save(summary=facts)
    rows = [
        [*name.split(" | "), f"{f['nll']:.4f}", *(f"{q:.4f}" for q in f["quarters"])]
        for name, f in facts.items()
    ]
    print(table(["trained", "run", "NLL", *(f"quarter {i}" for i in (1, 2, 3, 4))], rows))
    print(plot(cells, settings))


if __name__ == "__main__":
    run(app)

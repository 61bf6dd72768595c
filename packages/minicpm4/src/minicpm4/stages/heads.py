"""Stage `heads`: a real model's retaining heads are trained, and judged beside what needs none.

The tool is `locret` (arXiv 2410.01805). Heads learn which keys are looked at by questions about
facts strewn into the text that `clean` kept, and by its own repetition. Then windows that no head
learned from are compressed to a share of their entries, and their last words' loss says what was
lost. A longer text shows that memory is bounded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs

OTHERS = ("expected", "keydiff", "keynorm", "streaming", "random")


class HeadsStageConfig(StageConfig):
    """Keys of the stage `heads` in a pipeline's YAML."""

    model: str = Field(default="smollm2", description="`smollm2`, or a transformers folder")
    texts: int = Field(default=16, ge=2, description="windows; an eighth is only measured on")
    length: int = Field(default=512, ge=32, description="tokens of a window")
    answer: int = Field(default=64, ge=1, description="tokens at its end whose queries count")
    facts: float = Field(
        default=0.5, ge=0, le=1, description="share of the windows that get facts and questions"
    )
    repeats: float = Field(
        default=0.5, ge=0, le=1, description="share of the windows that are said twice"
    )
    hidden: int = Field(default=64, ge=0, description="width of a head; 0: ridge regression alone")
    epochs: int = Field(default=4, ge=1)
    budgets: list[float] = Field(default=[0.25, 0.125], min_length=1, description="shares kept")
    budget: int = Field(default=512, ge=16, description="entries kept, of the memory curve")
    chunk: int = Field(default=256, ge=16, description="tokens read at once")
    tokens: int = Field(default=3072, ge=32, description="length of the memory curve")


def run(config: HeadsStageConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Train, compare, and follow the memory."""
    with needs("locret", "heads"):
        from locret.data import examples
        from locret.evaluate import nll_by_budget, overlaps
        from locret.training import TrainConfig, train
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    path = model_path(config.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    ).eval()
    with inputs["text"].open(encoding="utf-8") as stream:
        text = "\n\n".join(json.loads(line)["text"] for line in stream)
    windows = examples(
        [text], tokenizer, length=config.length, answer=config.answer, count=config.texts,
        facts=config.facts, repeats=config.repeats,
    )  # fmt: skip
    learning = TrainConfig(hidden=config.hidden, epochs=config.epochs, seed=space.seed)
    heads, facts = train(
        model, windows, learning, space.path / "work",
        lambda text, done: space.progress(text, 0.5 * done),
    )  # fmt: skip
    heads.save(space.path / "heads", **facts)
    unseen = windows[facts["texts"] :]
    eyes: dict[str, Any] = {"heads": heads, **{name: name for name in OTHERS}}
    best = space.once("overlap", lambda: overlaps(model, eyes, unseen))
    losses = space.once(
        "losses",
        lambda: nll_by_budget(
            model, eyes, unseen, config.budgets, chunk=config.chunk,
            progress=lambda text, done: space.progress(text, 0.6 + 0.3 * done),
        ),
    )  # fmt: skip
    space.progress("the memory curve", 0.9)
    curve = space.once("curve", lambda: _curve(model, heads, config))
    space.write_metrics(
        {
            "model": config.model,
            "trained": facts,
            "unseen": len(unseen),
            "budgets": config.budgets,
            "overlap": best,
            "losses": losses,
            "curve": curve,
            "settings": config.model_dump(exclude={"inputs"}),
        }
    )
    shutil.rmtree(space.path / "work")


def _curve(model: Any, heads: Any, config: HeadsStageConfig) -> list[dict[str, int]]:
    """Bytes of keys and values after each chunk of a text, bounded and as a full cache has them."""
    import torch

    from locret import LocretCache, LocretConfig, locret

    sizes = LocretConfig(
        budget=config.budget, chunk=config.chunk, stabilisers=config.budget // 4, sinks=4, local=0
    )
    cache, rows = LocretCache(sizes), []
    ids = torch.randint(
        5, model.config.vocab_size, (1, config.tokens), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad(), locret(model, heads, sizes):
        for piece in ids.split(config.chunk, dim=1):
            model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
            token = cache.kv_bytes() // cache.layers[0].held
            rows.append(
                {
                    "tokens": cache.columns,
                    "bounded": cache.kv_bytes(),
                    "full": token * cache.columns,
                    "bound": token * sizes.capacity,
                }
            )
    return rows


def check(config: HeadsStageConfig) -> None:
    """The model must exist, and a window must hold more than its answer."""
    model_path(config.model)
    if config.answer >= config.length:
        raise ValueError(
            f"stages.heads.answer: {config.answer} tokens leave nothing of a window of "
            f"{config.length}: give fewer"
        )
    if config.facts + config.repeats > 1:
        raise ValueError(
            f"stages.heads.facts and .repeats: {config.facts} and {config.repeats} are more than "
            "all windows: give 1 together at most"
        )
    if not all(0 < share <= 1 for share in config.budgets):
        raise ValueError(f"stages.heads.budgets: expected shares in (0, 1], got {config.budgets}")


def estimate(config: HeadsStageConfig, inputs: dict[str, Path]) -> Estimate:
    """A 135M model reads the windows once, the unseen ones again for each scorer and budget."""
    unseen = max(1, config.texts // 8)
    reads = config.texts + unseen * (1 + (len(OTHERS) + 1) * (1 + len(config.budgets)))
    learning = 12 * 30 * 576 * config.hidden * config.texts * config.length * config.epochs
    flops = 2 * 135e6 * (reads * config.length + config.tokens) + learning
    return Estimate(
        seconds=15 + flops / 60e9,
        memory_bytes=2_000_000_000,
        disk_bytes=40_000 * config.texts * config.length + 20_000_000,
        detail=config.model,
    )


STAGE = Stage(
    name="heads",
    summary="retaining heads are trained; what a bounded cache loses, beside other scorers",
    config=HeadsStageConfig,
    run=run,
    estimate=estimate,
    inputs={"text": "clean.kept"},
    outputs={"metrics": "metrics.json", "heads": "heads"},
    sources=("locret", "minicpm4.stages.heads"),
    external=lambda config: {config.model: model_identity(config.model)},
    check=check,
)

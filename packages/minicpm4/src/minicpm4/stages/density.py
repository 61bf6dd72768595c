"""Stage `density`: the Densing Law's trend, and the pipeline's own models placed on a ladder.

The tool is `densing`. The trend comes from its table of published models. The pipeline's models are
far too small for those benchmarks, so they are placed by conditional loss, as the paper places its
own: a ladder of tiny models of one recipe is trained on the same text, the loss law is fitted to
it, and each model's loss is read backwards to the size at which the ladder would be as good.
"""

from __future__ import annotations

import json
import math
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs
from minicpm4.stages.ladder import HEAD_DIM, measured, place, train_rung
from minicpm4.stages.pretrain import (
    ASSUMED_FLOPS_PER_CORE,
    FLOPS_PER_PARAMETER,
    MODEL_SOURCES,
    PretrainConfig,
    texts,
)

PROMPT_CHARS, ANSWER_CHARS = 300, 160


class DensityStageConfig(StageConfig):
    """Keys of the stage `density` in a pipeline's YAML."""

    benchmark: str = Field(default="MMLU", description="which published scores the trend uses")
    parameters: Literal["total", "active"] = Field(
        default="total", description="count total or active parameters"
    )
    estimator: str = Field(default="envelope", description="see `densing trend --help`")
    resamples: int = Field(default=1000, ge=0, description="bootstrap resamples of an interval")
    widths: list[int] = Field(
        default=[32, 64, 128], min_length=2, description="hidden sizes of the ladder's models"
    )
    steps: list[int] = Field(
        default=[100, 200, 400], min_length=2, description="training steps of each of them"
    )
    batch_size: int = Field(default=8, ge=1)
    length: int = Field(default=128, ge=16)
    lr: float = Field(default=0.01, gt=0, description="µP: the same for every width")
    pairs: int = Field(default=80, ge=4, description="prompts and answers from held-out text")
    model: str = Field(default="smollm2", description="also measured: `smollm2` or a folder")


def run(config: DensityStageConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Trend, ladder, the pipeline's own models."""
    with needs("densing", "density"):
        import densing  # noqa: F401 - said here, before any work
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    missing = [name for name in ("text", "model", "data", "metrics") if name not in inputs]
    if missing:
        raise ValueError(
            f"the inputs {', '.join(missing)} are missing: put the stages clean and pretrain "
            "before it, or give their paths under inputs"
        )
    before = json.loads(inputs["metrics"].read_text(encoding="utf-8"))
    space.progress("the trend of published models", 0.0)
    trend = space.once("trend", lambda: _trend(config, space.seed))
    pairs = _pairs(inputs["text"], PretrainConfig(**before["settings"]), config.pairs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs["model"], local_files_only=True)
    runs = []
    rungs = [(width, steps) for width in config.widths for steps in config.steps]
    for index, (width, steps) in enumerate(rungs):
        space.progress(f"ladder: width {width}, {steps} steps", 0.05 + 0.75 * index / len(rungs))
        runs.append(
            space.once(
                f"rung-{width}-{steps}",
                lambda width=width, steps=steps: train_rung(
                    config, inputs["data"], tokenizer, pairs, width, steps, space
                ),
            )
        )
    models = {}
    for name, load in _own(config, inputs).items():
        space.progress(f"measuring {name}", 0.85)
        models[name] = space.once(
            f"model-{len(models)}", lambda load=load: measured(*load(), pairs)
        )
    placed = place(runs, models, before["tokens_seen"], config, space.seed)
    shutil.rmtree(space.path / "ladder", ignore_errors=True)
    space.write_metrics({"trend": trend, "pairs": len(pairs), "runs": runs, **placed})


def _trend(config: DensityStageConfig, seed: int) -> dict[str, Any]:
    """The headline of the table that ships, its sensitivity, and its band on a grid of dates."""
    import numpy as np

    import densing

    choices = densing.Choices(basis=config.parameters, benchmark=config.benchmark)
    found = densing.headline(
        densing.curated_table(), choices, config.estimator, anchors=["Llama 2", "Qwen2.5"],
        resamples=config.resamples, seed=seed,
    )  # fmt: skip
    days = np.linspace(0, found.densities.points.days.max(), 25)
    low, high = found.trend.band(days)
    middle = found.trend.slope * days + found.trend.intercept
    band = [
        [str(found.trend.zero + timedelta(days=float(d))), *(math.exp(v) for v in row)]
        for d, *row in zip(days, low, middle, high, strict=True)
    ]
    return {**found.to_dict(), "band": band, "range": list(found.range)}


def _pairs(path: Path, settings: PretrainConfig, count: int) -> list[Any]:
    """The beginnings of held-out passages as prompts, what follows as answers."""
    from densing import Pair

    found = []
    for text in texts(path, settings, held_out=True):
        cut = text.rfind(" ", 0, PROMPT_CHARS)
        end = text.rfind(" ", 0, cut + ANSWER_CHARS)
        if cut > PROMPT_CHARS // 2 and end > cut + ANSWER_CHARS // 2:
            found.append(Pair(str(len(found)), text[:cut], text[cut:end]))
        if len(found) == count:
            break
    if len(found) < 4:
        raise ValueError(
            f"{len(found)} held-out passages are long enough for a prompt and an answer, "
            "expected at least 4: give more text, or a larger pretrain.validation_share"
        )
    return found


def _own(config: DensityStageConfig, inputs: dict[str, Path]) -> dict[str, Any]:
    """What is placed, by name; each is loaded when its turn comes."""
    import torch
    import transformers

    from minicpm4.presets import load, register

    def words(path: Path) -> Any:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)

    def full() -> tuple[Any, Any]:
        return load(inputs["model"], dtype=torch.float32).eval(), words(inputs["model"])

    def ternary() -> tuple[Any, Any]:
        with needs("bitcpm", "density"):
            import bitcpm
        register()
        return bitcpm.load_packed_model(inputs["packed"]).float().eval(), words(inputs["packed"])

    def other() -> tuple[Any, Any]:
        path = model_path(config.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        return model.eval(), words(path)

    found = {"ours, full precision": full}
    if "packed" in inputs:
        found["ours, ternary"] = ternary
    return {**found, config.model: other}


def check(config: DensityStageConfig) -> None:
    """Widths and steps that make a ladder; the other model must be there."""
    for width in config.widths:
        if width < HEAD_DIM or width % HEAD_DIM:
            raise ValueError(
                f"stages.density.widths: {width} is not a multiple of {HEAD_DIM}, the head size"
            )
    for name in ("widths", "steps"):
        values = getattr(config, name)
        if len(set(values)) != len(values) or min(values) < 2:
            raise ValueError(f"stages.density.{name}: expected different values, got {values}")
    if len(config.widths) * len(config.steps) < 5:
        raise ValueError(
            "stages.density: widths times steps must be at least 5, to fit four constants"
        )
    model_path(config.model)


def estimate(config: DensityStageConfig, inputs: dict[str, Path]) -> Estimate:
    """FLOPs of the ladder; measuring is a few seconds a model."""
    vocabulary = 4096
    parameters = sum(w * vocabulary + 2 * 16 * w * w for w in config.widths)
    tokens = sum(config.steps) * config.batch_size * config.length
    return Estimate(
        seconds=30 + FLOPS_PER_PARAMETER * parameters * tokens / (2 * ASSUMED_FLOPS_PER_CORE),
        memory_bytes=1_600_000_000,
        disk_bytes=80 * vocabulary * max(config.widths) + 5_000_000,
        detail=config.model,
    )


STAGE = Stage(
    name="density",
    summary="the Densing Law's trend; the pipeline's models on a ladder, by conditional loss",
    config=DensityStageConfig,
    run=run,
    estimate=estimate,
    inputs={
        "text": "clean.kept",
        "model": "pretrain.model",
        "data": "pretrain.data",
        "metrics": "pretrain.metrics",
        "packed": "ternary.packed",
    },
    outputs={"metrics": "metrics.json"},
    sources=(
        "densing",
        *(f"minicpm4.stages.{name}" for name in ("density", "ladder", "pretrain")),
        *MODEL_SOURCES,
    ),
    external=lambda config: {config.model: model_identity(config.model)},
    check=check,
    takes_what_there_is=True,  # a pipeline without the stage ternary has no packed model
)

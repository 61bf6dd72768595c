"""Stage `ternary`: the same training budget, with its last part as ternary QAT, then packed.

The tool is `bitcpm`. The run branches off `pretrain`'s stable part: same past, same data, same
number of steps; only the last share of them differs. Three losses are compared on the same held-out
text: full precision, ternary QAT, and full precision cut to ternary without any training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pydantic import Field

from minicpm4._files import atomic_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs
from minicpm4.stages.pretrain import MODEL_SOURCES, PretrainConfig, read_log, speed, train_config


class TernaryStageConfig(StageConfig):
    """Keys of the stage `ternary` in a pipeline's YAML."""

    group_size: int = Field(default=64, description="weights that share a scale; -1 = a row")
    lr_ratio: float = Field(default=0.5, gt=0, description="peak of QAT over peak of pretraining")
    rewarmup_steps: int = Field(default=20, ge=0, description="the paper calls it critical")
    codec: str = Field(default="1.6bit", pattern="^(1.6bit|2bit)$")


def run(config: TernaryStageConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Train the second stage, write the model ternary and packed, compare."""
    with needs("bitcpm", "ternary"):
        import bitcpm
    import torch
    import transformers

    from minicpm4.data import TokenData
    from minicpm4.presets import load, register
    from minicpm4.trainer import evaluate, load_weights, train

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    before = json.loads(inputs["metrics"].read_text(encoding="utf-8"))
    settings = PretrainConfig(**before["settings"])
    steps, branch = before["steps"], before["branch_step"]
    ternary = bitcpm.TernaryConfig(group_size=config.group_size)
    schedule = bitcpm.TwoStage(
        steps,
        bitcpm.TwoStageConfig(
            qat_fraction=1 - branch / steps,
            lr=settings.lr,
            qat_lr_ratio=config.lr_ratio,
            warmup_steps=settings.warmup_steps,
            rewarmup_steps=config.rewarmup_steps,
            decay_fraction=settings.decay_fraction,
            # The paper's rule is at least 0.4 of the tokens; the pipeline's branch point decides.
            allow_short_qat=True,
        ),
    )
    if schedule.switch_step != branch:
        raise ValueError(
            f"pretrain branched at step {branch} of {steps}, which is no share of whole steps: "
            "choose steps and branch_fraction whose product is whole"
        )
    data, validation = (TokenData(inputs["data"] / name) for name in ("train", "validation"))
    model = load(inputs["model"], dtype=torch.float32)
    load_weights(model, inputs["branch"])
    bitcpm.ternarize(model, ternary)
    trainer = train_config(settings, space.seed)

    def show(step: int, loss: float) -> None:
        done = (step - branch) / (steps - branch)
        space.progress(f"QAT step {step - branch} of {steps - branch}, loss {loss:.3f}", 0.9 * done)

    result = train(
        model,
        data,
        validation,
        lambda step: schedule(step).lr,
        steps,
        trainer,
        space.path / "training",
        first_step=branch,
        on_step=show,
    )
    stats = bitcpm.quantisation_stats(model)
    bitcpm.materialise(model)
    # bf16 holds a ternary weight as exactly as fp32 does, but for the rounding of its scale.
    model.to(torch.bfloat16)
    with atomic_path(space.path / "model") as target:
        model.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(inputs["model"]).save_pretrained(target)
    shutil.rmtree(space.path / "packed", ignore_errors=True)
    space.progress("packing", 0.92)
    packed = bitcpm.pack_model(
        space.path / "model", space.path / "packed", ternary, codec=config.codec
    )

    space.progress("comparing", 0.95)
    register()
    # What is compared is what was written: read back from the packed folder.
    shipped = bitcpm.load_packed_model(space.path / "packed").float()
    untrained = load(inputs["model"], dtype=torch.float32)
    losses = {"full precision": evaluate(untrained, validation, trainer)}
    losses["ternary QAT"] = evaluate(shipped, validation, trainer)
    bitcpm.materialise(bitcpm.ternarize(untrained, ternary))
    losses["ternary without training"] = evaluate(untrained, validation, trainer)
    per_byte = len(validation) / validation.bytes
    parameters = sum(p.numel() for p in shipped.parameters())
    for part in (space.path / "training").glob("checkpoint-*"):
        shutil.rmtree(part)
    space.write_metrics(
        {
            "group_size": config.group_size,
            "codec": config.codec,
            "branch_step": branch,
            "steps": steps,
            "train": read_log(result.log),
            "validation": result.validation,
            "loss": losses,
            "loss_per_byte": {name: loss * per_byte for name, loss in losses.items()},
            "bytes": {
                "fp32": 4 * parameters,
                "bf16": 2 * parameters,
                "packed": sum(
                    f.stat().st_size for f in (space.path / "packed").glob("*.safetensors")
                ),
                "matrices bf16": sum(before for before, _ in packed.tensors.values()),
                "matrices packed": sum(after for _, after in packed.tensors.values()),
            },
            "zero_share": sum(s.zero_share for s in stats.values()) / len(stats),
        }
    )
    space.write_timings({"tokens_per_second": speed(result.tokens_per_second)})


def estimate(config: TernaryStageConfig, inputs: dict[str, Path]) -> Estimate:
    """A share of `pretrain`'s work; its real sizes are known only once it is done."""
    metrics = inputs["metrics"]
    if not metrics.exists():
        return Estimate(120, 2_000_000_000, 60_000_000, detail="as pretrain")
    before = json.loads(metrics.read_text(encoding="utf-8"))
    timings = json.loads((metrics.parent / "timings.json").read_text(encoding="utf-8"))
    share = 1 - before["branch_step"] / before["steps"]
    seconds = before["tokens_seen"] * share / max(1.0, timings["tokens_per_second"] or 1.0)
    return Estimate(
        seconds=15 + 1.2 * seconds,
        memory_bytes=900_000_000 + 100 * before["parameters"],
        disk_bytes=40 * before["parameters"] + 10_000_000,
    )


STAGE = Stage(
    name="ternary",
    summary="the last part of the same budget as ternary QAT; pack the result",
    config=TernaryStageConfig,
    run=run,
    estimate=estimate,
    inputs={
        "model": "pretrain.model",
        "branch": "pretrain.branch",
        "data": "pretrain.data",
        "metrics": "pretrain.metrics",
    },
    outputs={
        "model": "model",
        "packed": "packed",
        "metrics": "metrics.json",
        "timings": "timings.json",
    },
    sources=("bitcpm", "minicpm4.stages.ternary", *MODEL_SOURCES),
)

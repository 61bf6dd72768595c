"""Stage `pretrain`: a small MiniCPM4 with a tokenizer of its own learns the kept text.

Warm-up – Stable – Decay. The weights in the middle of the stable part are kept as well: a run that
wants to end another way (stage `ternary`) branches off there and has the same past.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from minicpm4._files import atomic_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace
from minicpm4.pipeline.text import in_share
from minicpm4.presets import PRESETS

# Multiply-adds of one token's forward and backward pass, for each parameter: 2 + 4.
FLOPS_PER_PARAMETER = 6
# What a desktop core reaches on matrices this small: for the estimate only.
ASSUMED_FLOPS_PER_CORE = 20e9

MODEL_SOURCES = tuple(
    f"minicpm4.{module}"
    for module in (
        *("configuration", "layers", "longrope", "modeling", "presets"),
        *("schedule", "trainer", "checkpoint", "data", "tokenizer"),
    )
)
"""What decides the outcome of a training run."""


class PretrainConfig(StageConfig):
    """Keys of the stage `pretrain` in a pipeline's YAML."""

    preset: Literal["nano", "micro", "mini"] = Field(default="micro", description="model size")
    vocab_size: int = Field(default=4096, ge=512, le=65536)
    steps: int = Field(default=500, ge=10)
    batch_size: int = Field(default=16, ge=1, description="windows in a step")
    length: int = Field(default=256, ge=16, description="tokens in a window")
    lr: float = Field(default=0.01, gt=0, description="peak rate; µP: the same for every width")
    warmup_steps: int = Field(default=30, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, lt=1)
    branch_fraction: float = Field(
        default=0.6, gt=0, lt=1, description="where in the run the branch's weights are kept"
    )
    validation_share: float = Field(default=0.03, gt=0, lt=0.5, description="documents held out")
    evaluations: int = Field(default=10, ge=1, description="points on the validation curve")
    eval_windows: int = Field(default=64, ge=1)
    bf16: bool | None = Field(
        default=None, description="bf16 matrix products; by default where the processor has them"
    )


def run(config: PretrainConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Tokenizer, tokens, training, and the model as a transformers folder."""
    import torch
    import transformers

    from minicpm4.data import pack
    from minicpm4.modeling import MiniCPM4ForCausalLM
    from minicpm4.presets import preset
    from minicpm4.schedule import WSD
    from minicpm4.tokenizer import train_bpe
    from minicpm4.trainer import train

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    words = space.path / "tokenizer"
    if not words.exists():
        space.progress("learning a BPE vocabulary", 0.0)
        with atomic_path(words) as target:
            train_bpe(
                texts(inputs["text"], config, held_out=False), config.vocab_size
            ).save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
    space.progress("encoding the text", 0.02)
    data, validation = (
        pack(texts(inputs["text"], config, held_out), tokenizer, space.path / "data" / name)
        for name, held_out in (("train", False), ("validation", True))
    )
    torch.manual_seed(space.seed)
    model = MiniCPM4ForCausalLM(preset(config.preset, vocab_size=len(tokenizer)))
    schedule = WSD(config.lr, config.steps, config.warmup_steps, config.decay_fraction)
    branch_step = round(config.steps * config.branch_fraction)

    def show(step: int, loss: float) -> None:
        text = f"step {step} of {config.steps}, loss {loss:.3f}"
        space.progress(text, 0.05 + 0.95 * step / config.steps)

    result = train(
        model,
        data,
        validation,
        schedule,
        config.steps,
        train_config(config, space.seed),
        space.path / "training",
        branch_at=branch_step,
        on_step=show,
    )
    with atomic_path(space.path / "model") as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    for part in (space.path / "training").glob("checkpoint-*"):
        shutil.rmtree(part)
    space.write_metrics(
        {
            "preset": config.preset,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": {"train": len(data), "validation": len(validation)},
            "bytes_per_token": data.bytes / len(data),
            "tokens_seen": config.steps * config.batch_size * config.length,
            "steps": config.steps,
            "branch_step": branch_step,
            "train": read_log(result.log),
            "validation": result.validation,
            "settings": config.model_dump(exclude={"inputs"}),
        }
    )
    space.write_timings({"tokens_per_second": speed(result.tokens_per_second)})


def train_config(config: PretrainConfig, seed: int):  # noqa: ANN201 - imports torch
    """The trainer's part of the configuration; stage `ternary` trains with the same."""
    from minicpm4.trainer import TrainConfig

    return TrainConfig(
        batch_size=config.batch_size,
        length=config.length,
        eval_every=max(1, config.steps // config.evaluations),
        eval_windows=config.eval_windows,
        bf16=has_bf16() if config.bf16 is None else config.bf16,
        seed=seed,
    )


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices natively; emulated, they are slower."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def speed(tokens_per_second: float) -> float | None:
    """None where nothing was left to train after a kill: there is no speed to report then."""
    return tokens_per_second if math.isfinite(tokens_per_second) else None


def read_log(path: Path) -> list[list[float]]:
    """(step, training loss, learning rate) of every step of a training log."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [[row["step"], row["loss"], row["lr"]] for row in rows]


def texts(path: Path, config: PretrainConfig, held_out: bool) -> Iterator[str]:
    """Texts to train on, or those held out; a document is on one side with all its passages."""
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
                name, text = str(record.get("id", number)), record["text"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}:{number}: expected JSON lines with a key 'text', got {line[:40]!r}"
                ) from None
            if in_share(name, config.validation_share, "validation") == held_out:
                yield text


def estimate(config: PretrainConfig, inputs: dict[str, Path]) -> Estimate:
    """FLOPs of the training, and weights, gradients, moments and activations in fp32."""
    parameters = _parameters(config)
    tokens = config.steps * config.batch_size * config.length
    flops = FLOPS_PER_PARAMETER * parameters * tokens
    logits = config.batch_size * config.length * config.vocab_size * 4
    return Estimate(
        seconds=10 + flops / (ASSUMED_FLOPS_PER_CORE * 2),
        memory_bytes=900_000_000 + 16 * parameters + 6 * logits,
        disk_bytes=60 * parameters + 20_000_000,
    )


def _parameters(config: PretrainConfig) -> int:
    """Parameters of the preset, from its sizes alone: nothing heavy is imported to plan."""
    size = PRESETS[config.preset]
    width, layers = size["hidden_size"], size["num_hidden_layers"]
    kv = width * size["num_key_value_heads"] // size["num_attention_heads"]
    layer = 2 * width * width + 2 * width * kv + 3 * width * size["intermediate_size"] + 2 * width
    return config.vocab_size * width + layers * layer + width


STAGE = Stage(
    name="pretrain",
    summary="train a small MiniCPM4 with its own tokenizer on the kept text",
    config=PretrainConfig,
    run=run,
    estimate=estimate,
    inputs={"text": "clean.kept"},
    outputs={
        "model": "model",
        "branch": "training/branch.safetensors",
        "data": "data",
        "metrics": "metrics.json",
        "timings": "timings.json",
    },
    sources=("minicpm4.stages.pretrain", *MODEL_SOURCES),
)

"""Stage `generate`: SmolLM2 and the pipeline's own models write; how fast, in how much memory.

The tool is `cpmcu`. Texts are greedy and so repeatable; speeds are measured after a warm-up.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from pydantic import Field

from minicpm4.pipeline.memory import peak_bytes, reset_peak
from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs


class GenerateConfig(StageConfig):
    """Keys of the stage `generate` in a pipeline's YAML."""

    model: str = Field(default="smollm2", description="a chat model: `smollm2`, folder or .gguf")
    questions: list[str] = Field(
        default=[
            "What is the capital of France?",
            "Explain in one sentence why the sky is blue.",
        ],
        min_length=1,
        description="what the chat model is asked",
    )
    prompts: list[str] = Field(
        default=["The history of", "In mathematics, a"],
        min_length=1,
        description="what the pipeline's own models continue",
    )
    max_new_tokens: int = Field(default=64, ge=2)
    prefill_tokens: int = Field(default=512, ge=1, description="length of the timed prompt")
    repeats: int = Field(default=3, ge=1, description="timed runs; the median is reported")


def run(config: GenerateConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Load each model in turn, generate, measure."""
    with needs("cpmcu", "generate"):
        import cpmcu  # noqa: F401 - said here, before any work

    models = {"smollm2" if config.model == "smollm2" else config.model: model_path(config.model)}
    if "model" in inputs:
        models["ours, full precision"] = inputs["model"]
    if "packed" in inputs:
        models["ours, ternary (packed)"] = inputs["packed"]
    texts, timings = {}, {}
    for index, (name, path) in enumerate(models.items()):
        space.progress(f"{name} writes", index / len(models))
        found = space.once(
            f"model-{index}",
            lambda path=path, index=index: _measure(config, path, index == 0, space.threads),
        )
        texts[name], timings[name] = {"samples": found["samples"]}, found["timings"]
    space.write_metrics({"models": texts})
    space.write_timings(timings)


def _measure(config: GenerateConfig, path: Path, chat: bool, threads: int) -> dict[str, Any]:
    """Texts, and tokens per second of prefill and decode, of one model."""
    from cpmcu import Engine

    reset_peak()
    engine = Engine.from_pretrained(path, threads=threads)
    samples = []
    for words in config.questions if chat else config.prompts:
        pieces = engine.generate(
            **({"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}),
            max_new_tokens=config.max_new_tokens,
            # A model of a few million parameters repeats itself without end otherwise.
            repetition_penalty=1.0 if chat else 1.3,
            stream=True,
        )
        text = "".join(pieces)
        samples.append({"prompt": words, "text": text, "ended": pieces.result.finish_reason})
    length = min(config.prefill_tokens, engine.max_context - config.max_new_tokens)
    # Any ids do for timing; distinct ones, so that nothing can be answered from a cache.
    ids = [index % engine.spec.vocab for index in range(100, 100 + length)]
    prefill, decode = [], []
    for attempt in range(config.repeats + 1):
        engine.reset()
        stats = engine.generate(token_ids=ids, max_new_tokens=config.max_new_tokens).stats
        if attempt:  # the first one warms up
            prefill.append(stats.prefill_tokens_per_second)
            if stats.new_tokens > 1:
                decode.append(stats.decode_tokens_per_second)
    return {
        "samples": samples,
        "timings": {
            "prefill_tokens": length,
            "prefill_tokens_per_second": statistics.median(prefill),
            "decode_tokens_per_second": statistics.median(decode) if decode else 0.0,
            "peak_memory_bytes": peak_bytes(),
            "dtype": str(engine.dtype).removeprefix("torch."),
        },
    }


def check(config: GenerateConfig) -> None:
    """The chat model must be there."""
    model_path(config.model)


def estimate(config: GenerateConfig, inputs: dict[str, Path]) -> Estimate:
    """Loading, and a few hundred tokens of a model of 135M parameters."""
    tokens = (len(config.questions) + config.repeats + 1) * config.max_new_tokens
    return Estimate(20 + tokens / 15, 1_800_000_000, 2_000_000, detail=config.model)


STAGE = Stage(
    name="generate",
    summary="text, tokens per second and peak memory of each model",
    config=GenerateConfig,
    run=run,
    estimate=estimate,
    inputs={"model": "pretrain.model", "packed": "ternary.packed"},
    outputs={"metrics": "metrics.json", "timings": "timings.json"},
    sources=("cpmcu", "minicpm4.stages.generate"),
    takes_what_there_is=True,
    external=lambda config: {config.model: model_identity(config.model)},
    check=check,
)

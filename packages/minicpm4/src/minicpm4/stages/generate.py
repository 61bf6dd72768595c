"""Stage `generate`: SmolLM2 and the pipeline's own models write; how fast, in how much memory.

SmolLM2 by kind of weights, and on a long prompt with dense and with sparse attention. The tool is
`cpmcu`. Texts are greedy and so repeatable; speeds are measured after a warm-up.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from pydantic import Field

from minicpm4.pipeline.memory import peak_bytes, reset_peak
from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs

# Attention of the timed long prompt: a budget well below its length, so that there is a choice.
_SPARSE = {"window_size": 512, "topk": 16, "dense_len": 2048}
_WARM = 128  # tokens that are not timed: memory and clocks are then awake


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
    weights: list[str] = Field(
        default=["auto", "int8", "int4"],
        min_length=1,
        description="kinds of weights the chat model is run with, as `cpmcu generate --quant`",
    )
    prefill_tokens: int = Field(default=512, ge=1, description="length of the timed prompt")
    long_tokens: int = Field(
        default=6000,
        ge=0,
        description="length of the prompt on which dense and sparse attention are timed; 0: none",
    )
    repeats: int = Field(default=3, ge=1, description="timed runs; the median is reported")


def run(config: GenerateConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Load each model in turn, generate, measure."""
    with needs("cpmcu", "generate"):
        from cpmcu.cpu_library import kernels

    library, reason = kernels()
    if library is None:
        space.progress(f"no native engine ({reason}): one kind of weights, dense attention", 0.0)
    found, timings = {}, {}
    variants = _variants(config, inputs, native=library is not None)
    for index, (name, options) in enumerate(variants.items()):
        space.progress(f"{name} writes", index / len(variants))
        found[name] = space.once(
            f"variant-{index}",
            lambda options=options: _measure(config, threads=space.threads, **options),
        )
        timings[name] = found[name].pop("timings")
    space.write_metrics({"models": found})
    space.write_timings(timings)


def _variants(
    config: GenerateConfig, inputs: dict[str, Path], native: bool
) -> dict[str, dict[str, Any]]:
    """What is measured, by name: the chat model by kind of weights and of attention, then the
    pipeline's own models.
    """
    label, path = config.model, model_path(config.model)
    weights = config.weights if native else ["auto"]
    variants = {
        f"{label}, {kind} weights": {"path": path, "chat": True, "quant": kind} for kind in weights
    }
    if config.long_tokens and native:
        for sparse in (False, True):
            variants[f"{label}, {config.long_tokens} tokens, {'sparse' if sparse else 'dense'}"] = {
                "path": path, "chat": True, "quant": weights[-1], "sparse": sparse,
                "tokens": config.long_tokens,
            }  # fmt: skip
    for name, given in (("ours, full precision", "model"), ("ours, ternary", "packed")):
        if given in inputs:
            variants[name] = {"path": inputs[given], "chat": False}
    return variants


def _measure(
    config: GenerateConfig, *, path: Path, chat: bool, threads: int, quant: str = "auto",
    sparse: bool | None = None, tokens: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second of prefill and decode of one model, and its texts; with `sparse` given, on
    a long prompt and without texts.
    """
    from cpmcu import Engine, SparseAttention

    reset_peak()
    attention = SparseAttention(**_SPARSE) if sparse else "off" if sparse is not None else "auto"
    engine = Engine.from_pretrained(path, threads=threads, quant=quant, sparse=attention)
    samples = []
    for words in () if sparse is not None else config.questions if chat else config.prompts:
        pieces = engine.generate(
            **({"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}),
            max_new_tokens=config.max_new_tokens,
            # A model of a few million parameters repeats itself without end otherwise.
            repetition_penalty=1.0 if chat else 1.3,
            stream=True,
        )
        text = "".join(pieces)
        samples.append({"prompt": words, "text": text, "ended": pieces.result.finish_reason})
    length = min(tokens or config.prefill_tokens, engine.max_context - config.max_new_tokens)
    # Any ids do for timing; distinct ones, so that nothing can be answered from a cache.
    ids = [index % engine.spec.vocab for index in range(100, 100 + length)]
    prefill, decode = [], []
    engine.reset()
    engine.generate(token_ids=ids[:_WARM], max_new_tokens=2)
    for _ in range(config.repeats):
        engine.reset()
        stats = engine.generate(token_ids=ids, max_new_tokens=config.max_new_tokens).stats
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
            "weights": engine.quant,
        },
    }


def check(config: GenerateConfig) -> None:
    """The chat model must be there."""
    model_path(config.model)


def estimate(config: GenerateConfig, inputs: dict[str, Path]) -> Estimate:
    """Loading, and a few hundred tokens of a model of 135M parameters."""
    tokens = (len(config.questions) + config.repeats) * config.max_new_tokens
    long = 2 * config.repeats * config.long_tokens
    seconds = 20 + len(config.weights) * tokens / 25 + long / 500
    return Estimate(seconds, 1_800_000_000, 2_000_000, detail=config.model)


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

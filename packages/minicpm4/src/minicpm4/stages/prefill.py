"""Stage `prefill`: one long prompt on several hosts, strategies side by side.

The tool is `apb`. SmolLM2 reads the text of a needle task on virtual hosts, one after another in
this process, and then the question. What is compared is how well it predicts the right answer, how
far its predictions are from those of exact attention, what crossed the network, and the time of the
slowest host. SmolLM2 was trained for none of the approximate strategies. After a stage `heads`,
APB is there twice: its blocks chosen by the query's attention, and by those heads, as in the paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs

Task = Literal["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1"]
Strategy = Literal["ring", "zigzag", "ulysses", "star", "apb", "spava"]
WITH_HEADS = "apb, trained heads"


class PrefillConfig(StageConfig):
    """Keys of the stage `prefill` in a pipeline's YAML."""

    model: str = Field(default="smollm2", description="`smollm2`, or a transformers folder")
    task: Task = "niah_multikey_1"
    tokens: int = Field(default=2048, ge=256, description="prompt length")
    samples: int = Field(default=2, ge=1, description="prompts")
    hosts: int = Field(default=4, ge=2, le=64, description="virtual hosts")
    strategies: list[Strategy] = Field(
        default=["zigzag", "star", "apb", "spava"], min_length=1, description="besides dense"
    )
    trained_heads: bool = Field(
        default=True, description="APB by the heads of an earlier stage too, where there is one"
    )
    latency: float = Field(default=30e-6, ge=0, description="of a message, seconds")
    bandwidth: float = Field(default=1.25e9, gt=0, description="of a host, bytes / second")


def run(config: PrefillConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Prefill each prompt by each strategy, and score the answer."""
    with needs("testbed", "prefill"):
        import testbed
    with needs("apb", "prefill"):
        import apb
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    path = model_path(config.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    ).eval()
    samples = testbed.ruler(config.task, config.tokens, config.samples, space.seed, tokenizer)
    compressor = None
    if config.trained_heads and "heads" in inputs:
        compressor = apb.LocretHeads(inputs["heads"])
        try:
            compressor.check(model)
        except ValueError as error:
            raise ValueError(f"stages.prefill: {error}; or set trained_heads: false") from None
    names = ["dense", *config.strategies, *([WITH_HEADS] if compressor else [])]
    todo, rows = len(samples) * len(names), []
    for index, sample in enumerate(samples):
        for place, name in enumerate(names):
            space.progress(f"{name}, {config.tokens} tokens", (index * len(names) + place) / todo)
            rows.append(
                space.once(
                    f"{index}-{name}",
                    lambda sample=sample, name=name: _score(
                        model, tokenizer, sample, name, config, compressor
                    ),
                )
            )
    cases, seconds = [], []
    for name in names:
        mine = [row for row in rows if row["strategy"] == name]
        mean = {
            key: sum(row[key] for row in mine) / len(mine)
            for key in ("nll", "kl", "bytes_sent", "slowest_pairs", "seconds", "critical_path")
        }
        seconds.append({"strategy": name, "all_work": mean.pop("seconds"),
                        "critical_path": mean.pop("critical_path")})  # fmt: skip
        cases.append({"strategy": name, "samples": len(mine), **mean})
    space.write_metrics(
        {
            "model": config.model,
            "task": config.task,
            "tokens": config.tokens,
            "hosts": config.hosts,
            "cases": cases,
        }
    )
    space.write_timings({"seconds": seconds})


def _score(
    model: Any, tokenizer: Any, sample: Any, name: str, config: PrefillConfig, compressor: Any
) -> dict[str, Any]:
    """One prompt, one strategy; KL is from exact attention on the same answer."""
    import time

    import apb
    import testbed

    text = testbed.ruler_prompt(sample, tokenizer)
    question = sample.prompt.rsplit("\n", 1)[1]
    cut = text.rindex(question)

    def ids(part: str) -> Any:
        return tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids

    document, query, answer = ids(text[:cut]), ids(text[cut:]), ids(" " + sample.answers[0])
    group = apb.VirtualGroup(config.hosts, latency=config.latency, bandwidth=config.bandwidth)
    began = time.perf_counter()
    context = apb.prefill(
        model,
        document,
        strategy="apb" if name == WITH_HEADS else name,
        hosts=group,
        query=query if name in ("apb", "spava", WITH_HEADS) else None,
        compressor=compressor if name == WITH_HEADS else None,
    )
    seconds, critical_path = time.perf_counter() - began, max(group.clocks)
    exact = apb.prefill(model, document, strategy="dense", hosts=1) if name != "dense" else context
    scored = [
        c.logits(_join(query, answer))[:, -answer.shape[1] - 1 : -1].log_softmax(-1)
        for c in (context, exact)
    ]
    nll = -scored[0].gather(-1, answer.unsqueeze(-1)).mean().item()
    kl = (scored[1].exp() * (scored[1] - scored[0])).sum(-1).mean().item()
    return {
        "strategy": name,
        "nll": nll,
        "kl": max(kl, 0.0),
        "bytes_sent": sum(context.report.bytes_sent.values()),
        "slowest_pairs": max(context.report.pairs.values()),
        "seconds": seconds,
        "critical_path": critical_path,
    }


def _join(query, answer):  # noqa: ANN001, ANN202
    import torch

    return torch.cat([query, answer], 1)


def check(config: PrefillConfig) -> None:
    """The model must exist."""
    model_path(config.model)


def estimate(config: PrefillConfig, inputs: dict[str, Path]) -> Estimate:
    """A 135M model's prefill, twice for each strategy (exact attention for comparison)."""
    approximate = len(config.strategies) + (config.trained_heads and "heads" in inputs)
    prompts = config.samples * (1 + 2 * approximate)
    n = config.tokens
    return Estimate(
        seconds=15 + prompts * (2 * 135e6 * n + 30 * 2 * 9 * 64 * n * n) / 80e9,
        memory_bytes=1_500_000_000 + 200_000 * n,
        disk_bytes=100_000,
        detail=config.model,
    )


STAGE = Stage(
    name="prefill",
    summary="one long prompt on several hosts: exact, Star, APB side by side",
    config=PrefillConfig,
    run=run,
    estimate=estimate,
    inputs={"heads": "heads.heads"},
    outputs={"metrics": "metrics.json", "timings": "timings.json"},
    sources=("apb", "locret", "testbed.ruler_tasks", "minicpm4.stages.prefill"),
    takes_what_there_is=True,
    external=lambda config: {config.model: model_identity(config.model)},
    check=check,
)

"""Stage `sparse`: a real model finds needles in a long context, dense and sparse.

The tool is `infllm2`. Both runs see the same prompts and decode greedily; what is compared is
whether the answer is found, the seconds spent in attention, and the share of causal blocks that
were visited. SmolLM2 was not trained with sparse attention: this is the training-free case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from minicpm4._files import write_json
from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs

Task = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
]  # fmt: skip


class SparseStageConfig(StageConfig):
    """Keys of the stage `sparse` in a pipeline's YAML."""

    model: str = Field(default="smollm2", description="`smollm2`, or a transformers folder")
    tasks: list[Task] = Field(default=["niah_single_1", "niah_single_2"], min_length=1)
    tokens: list[int] = Field(default=[4096, 7168], min_length=1, description="prompt lengths")
    samples: int = Field(default=1, ge=1, description="prompts for each task and length")
    max_new_tokens: int = Field(default=24, ge=1, description="a needle's value is shorter")
    block_size: int = Field(default=64, ge=1)
    init_blocks: int = Field(default=1, ge=0)
    window_size: int = Field(default=512, ge=0, description="always visible before each token")
    topk: int = Field(default=16, ge=0, description="chosen blocks besides the window's")
    figure_layer: int = Field(default=12, ge=0, description="layer whose blocks the report draws")


def run(config: SparseStageConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Answer each prompt twice."""
    with needs("testbed", "sparse"):
        import testbed
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    path = model_path(config.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    cases = [(task, tokens) for tokens in config.tokens for task in config.tasks]
    todo = len(cases) * config.samples * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    ).eval()
    sparse = _sizes(config)
    done, results, seconds = 0, [], []
    for task, tokens in cases:
        samples = testbed.ruler(task, tokens, config.samples, space.seed, tokenizer)
        answers: dict[str, list[dict[str, Any]]] = {"dense": [], "sparse": []}
        for index, sample in enumerate(samples):
            for mode in answers:
                space.progress(f"{task}, {tokens} tokens, {mode}", done / todo)
                answers[mode].append(
                    space.once(
                        f"{task}-{tokens}-{index}-{mode}",
                        lambda sample=sample, mode=mode: _answer(
                            model, tokenizer, sample, sparse if mode == "sparse" else None, config
                        ),
                    )
                )
                done += 1
        case: dict[str, Any] = {"task": task, "tokens": tokens}
        for mode, rows in answers.items():
            case[mode] = {
                "samples": len(rows),
                "accuracy": sum(r["score"] for r in rows) / len(rows),
                "visited_share": sum(r["visited"] for r in rows) / sum(r["causal"] for r in rows),
                "texts": [r["text"] for r in rows],
            }
        case["answers"] = [list(sample.answers) for sample in samples]
        results.append(case)
        seconds.append(
            {"task": task, "tokens": tokens}
            | {mode: sum(r["seconds"] for r in rows) for mode, rows in answers.items()}
        )
    figure = space.once("figure", lambda: _visited(model, tokenizer, sparse, config, space.seed))
    write_json(space.path / "visited.json", figure)
    space.write_metrics(
        {
            "model": config.model,
            "config": {
                key: getattr(config, key)
                for key in ("block_size", "init_blocks", "window_size", "topk")
            },
            "cases": results,
        }
    )
    space.write_timings({"attention_seconds": seconds})


def _sizes(config: SparseStageConfig) -> Any:
    """The tool's configuration; it refuses sizes that do not fit together."""
    with needs("infllm2", "sparse"):
        from infllm2 import InfLLMv2Config

    return InfLLMv2Config(
        block_size=config.block_size,
        init_blocks=config.init_blocks,
        window_size=config.window_size,
        topk=config.topk,
        dense_len=-1,
    )


def _answer(model, tokenizer, sample, sparse, config: SparseStageConfig) -> dict[str, Any]:  # noqa: ANN001
    """One prompt, one way: text, score, and what attention did."""
    import torch

    import infllm2
    import testbed

    ids = tokenizer(
        testbed.ruler_prompt(sample, tokenizer), return_tensors="pt", add_special_tokens=False
    )
    switched = (
        infllm2.traced_dense(model, block_size=config.block_size)
        if sparse is None
        else infllm2.sparse(model, sparse)
    )
    with torch.inference_mode(), switched as trace:
        out = model.generate(
            **ids,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            past_key_values=None if sparse is None else infllm2.SparseCache(sparse),
        )
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    totals = trace.summary()
    return {
        "text": text,
        "score": testbed.ruler_score([text], [sample.answers], sample.task),
        "seconds": totals["attention_seconds"],
        "visited": totals["visited_blocks"],
        "causal": totals["causal_blocks"],
    }


def _visited(model, tokenizer, sparse, config: SparseStageConfig, seed: int) -> dict[str, Any]:  # noqa: ANN001
    """Share of queries of each block that visit each block of keys, for the shortest prompt."""
    import torch

    import infllm2
    import testbed
    from infllm2.visualise import visited_map

    [sample] = testbed.ruler(config.tasks[0], min(config.tokens), 1, seed, tokenizer)
    ids = tokenizer(
        testbed.ruler_prompt(sample, tokenizer), return_tensors="pt", add_special_tokens=False
    )
    length = ids["input_ids"].shape[1]
    layer = min(config.figure_layer, model.config.num_hidden_layers - 1)
    with torch.inference_mode(), infllm2.sparse(model, sparse, keep_blocks=True) as trace:
        model(**ids, logits_to_keep=1)
    shares = visited_map(trace.blocks(layer), length, length, config.block_size)
    rows = [[None if x != x else round(float(x), 3) for x in row] for row in shares]  # NaN: later
    return {"layer": layer, "tokens": length, "depths": list(sample.depths), "map": rows}


def check(config: SparseStageConfig) -> None:
    """The model must exist, and its context must hold the longest prompt."""
    _sizes(config)
    path = model_path(config.model)
    limit = json.loads((path / "config.json").read_text(encoding="utf-8")).get(
        "max_position_embeddings"
    )
    longest = max(config.tokens)
    if limit is not None and longest > limit:
        raise ValueError(
            f"stages.sparse.tokens: {longest} tokens are more than the context of {config.model} "
            f"holds ({limit}): give at most {limit}"
        )


def estimate(config: SparseStageConfig, inputs: dict[str, Path]) -> Estimate:
    """A 135M model's prefill: linear layers, and attention that grows as n²."""
    prompts = config.samples * len(config.tasks) * 2
    flops = sum(2 * 135e6 * n + 30 * 2 * 9 * 64 * n * n for n in config.tokens) * prompts
    return Estimate(
        seconds=15 + flops / 80e9,
        memory_bytes=1_500_000_000 + 200_000 * max(config.tokens),
        disk_bytes=5_000_000,
        detail=config.model,
    )


STAGE = Stage(
    name="sparse",
    summary="needles in long contexts, dense and block-sparse attention",
    config=SparseStageConfig,
    run=run,
    estimate=estimate,
    inputs={},
    outputs={"metrics": "metrics.json", "timings": "timings.json", "visited": "visited.json"},
    sources=("infllm2", "testbed.ruler_tasks", "minicpm4.stages.sparse"),
    external=lambda config: {config.model: model_identity(config.model)},
    check=check,
)

"""RULER on a real model, not trained for sparse attention: dense, InfLLM v2, and two controls.

All sparse modes visit the same number of blocks. `chosen` is InfLLM v2; `window` spends the whole
budget on a longer window (streaming attention); `random` visits random blocks in place of the
best-scored ones. A text is read once for all questions about it: a `niah_multikey_1` text hides
four keys, and each is asked for, so questions of one text are not independent.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from shared import (
    HERE,
    QUICK,
    Cells,
    budget,
    dense,
    random_blocks,
    table,
    window_alone,
)
from torch import Tensor

from infllm2 import InfLLMv2Config, SparseCache, sparse
from infllm2._cli import run

MODES = ("chosen", "window", "random")
BUDGETS = {"512 + 16": (512, 16), "512 + 8": (512, 8), "256 + 4": (256, 4)}
# Texts by task and length. The long ones cost most of the time.
TEXTS = {
    "niah_multikey_1": {2048: 3, 4096: 3, 8192: 2},
    "niah_single_1": {2048: 8},
}
NEW_TOKENS = 12  # the answers are seven digits

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Question:
    """Tokens of the whole prompt `[n]`, tokens of the right answer, and its text."""

    prompt: Tensor
    gold: Tensor
    answer: str


def questions(sample: Any, tokenizer: Any) -> list[Question]:
    """The sample's own question, and the same about each other key hidden in its text."""
    import testbed

    text = testbed.ruler_prompt(sample, tokenizer)
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\w+)\.", text)
    asked = next(key for key, value in needles if value == sample.answers[0])
    cut = text.rindex("\nWhat is the special magic")

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        Question(ids(text[:cut] + text[cut:].replace(asked, key)), ids(f" {value}"), value)
        for key, value in needles
    ]


@torch.inference_mode()
def ask(model: Any, config: InfLLMv2Config, asked: list[Question]) -> dict[str, Any]:
    """Read the text, then for each question generate, go back, and score the right answer.

    Returns:
        `right`: by question, whether the answer was generated (RULER's substring rule); `nll`: mean
        nats per token of the right answer; `read_seconds`: of the text.
    """
    width = min(len(q.prompt) for q in asked)
    prompts = torch.stack([q.prompt[:width] for q in asked])
    same = (prompts == prompts[0]).all(0).long().cumprod(0).sum().item()
    common = min(int(same), width - 1)
    cache = SparseCache(config)

    def back_to(length: int) -> None:
        cache.crop(length - cache.get_seq_length())

    start = time.perf_counter()
    model(asked[0].prompt[None, :common], past_key_values=cache, logits_to_keep=1)
    result: dict[str, Any] = {"read_seconds": round(time.perf_counter() - start, 2)}
    result |= {"right": [], "nll": []}
    for question in asked:
        prompt = question.prompt[None]
        new = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, prompt.shape[1] :]
        result["right"].append(question.answer in model.tokenizer.decode(new))
        back_to(prompt.shape[1] - 1)
        row = torch.cat([prompt[0, -1:], question.gold[:-1]])[None]
        logits = model(row, past_key_values=cache).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits, question.gold)
        result["nll"].append(round(nll.item(), 4))
        back_to(common)
    return result


def opened(
    model: Any, mode: str, config: InfLLMv2Config, seed: int
) -> tuple[AbstractContextManager[Any], InfLLMv2Config]:
    """The model's attention in one mode, and the configuration its cache needs."""
    if mode == "dense":
        config = dense(config)
    if mode == "window":
        config = window_alone(config)
    select = random_blocks(seed) if mode == "random" else None
    return sparse(model, config, select=select), config


def plan(texts: dict[str, dict[int, int]], budgets: list[str]) -> Iterator[tuple[str, Callable]]:
    """Names and computations of all cells: a task, a length, a mode, a budget, a text."""
    loaded: dict[Any, Any] = {}

    def prepared(task: str, length: int, at: int) -> list[Question]:
        import testbed

        if "model" not in loaded:
            # One dtype for all modes.
            loaded["model"], tokenizer = testbed.smollm2(testbed.quick_dtype())
            loaded["model"].tokenizer = tokenizer
        key = task, length
        if key not in loaded:
            tokenizer = loaded["model"].tokenizer
            count = max(texts[task][length], at + 1)
            loaded[key] = testbed.ruler(task, length, count, 0, tokenizer)
        return questions(loaded[key][at], loaded["model"].tokenizer)

    def cell(task: str, length: int, mode: str, sizes: str, at: int) -> dict[str, Any]:
        asked = prepared(task, length, at)
        config = budget(*BUDGETS[sizes])
        context, config = opened(loaded["model"], mode, config, seed=at)
        with context as trace:
            result = ask(loaded["model"], config, asked)
        return {**result, "visited": round(trace.visited_share, 4)}

    # All modes of one text before the next text: a run cut short still compares like with like.
    for task, lengths in texts.items():
        for length, count in lengths.items():
            for at in range(count):
                modes = [("dense", budgets[0]), *((m, b) for b in budgets for m in MODES)]
                for mode, sizes in modes:
                    label = "dense" if mode == "dense" else f"{sizes} {mode}"
                    args = (task, length, mode, sizes, at)
                    yield f"{task} {length} | {label} | {at}", lambda args=args: cell(*args)


def summary(cells: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Over texts and questions: answers right, their number, mean NLL, NLL above dense."""
    groups: dict[str, dict[str, list[Any]]] = {}
    for name, cell in cells.items():
        where, label, _ = name.split(" | ")
        group = groups.setdefault(f"{where} | {label}", {"right": [], "nll": [], "visited": []})
        group["right"] += cell["right"]
        group["nll"] += cell["nll"]
        group["visited"].append(cell["visited"])
    return {
        name: {
            "right": sum(group["right"]),
            "of": len(group["right"]),
            "nll": round(statistics.mean(group["nll"]), 3),
            "visited": round(statistics.mean(group["visited"]), 3),
        }
        for name, group in groups.items()
    }


def show(facts: dict[str, dict[str, Any]]) -> str:
    """A table: a row for each mode and budget, a column for each task and length."""
    columns = list(dict.fromkeys(name.split(" | ")[0] for name in facts))
    labels = list(dict.fromkeys(name.split(" | ")[1] for name in facts))
    rows = []
    for label in labels:
        row = [label]
        for column in columns:
            f = facts[f"{column} | {label}"]
            share = f"{100 * f['visited']:.0f} %"
            row.append(f"{f['right']}/{f['of']}, {f['nll']:.2f} ({share})")
        rows.append(row)
    return table(["blocks", *columns], rows)


def plot(facts: dict[str, dict[str, Any]], cells: Cells) -> Path:
    """Gold-answer NLL by length, a panel for each budget, a line for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    task = next(iter(facts)).split(" ")[0]
    points: dict[str, dict[int, float]] = {}
    for name, f in facts.items():
        where, label = name.split(" | ")
        if where.startswith(f"{task} "):
            points.setdefault(label, {})[int(where.split(" ")[1])] = f["nll"]
    budgets = list(dict.fromkeys(n.rsplit(" ", 1)[0] for n in points if n != "dense"))
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(3.4 * len(budgets), 3.2), sharey=True, squeeze=False
    )
    for axis, sizes in zip(axes[0], budgets, strict=True):
        for label, colour in zip(("dense", *MODES), ("k", "C0", "C1", "C2"), strict=True):
            line = points[label if label == "dense" else f"{sizes} {label}"]
            name = {"chosen": "InfLLM v2", "window": "window alone"}.get(label, label)
            axis.plot(list(line), list(line.values()), f"{colour}o-", label=name, ms=4)
        axis.set(title=f"window {sizes} blocks", xlabel="tokens", xscale="log")
        axis.set_xticks(list(line), [f"{n // 1024}K" for n in line])
        axis.minorticks_off()
    axes[0][0].set_ylabel("NLL of the right answer, nats per token")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{task}, SmolLM2-135M-Instruct, no training", fontsize=10)
    figure.tight_layout()
    return cells.figure(figure)


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Smoke run: one short text, to runs/.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Holds results/ and figures/; beside this script.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Start nothing later than this; run again to go on.")
    ] = 1e9,
) -> None:
    """RULER's needles on SmolLM2-135M-Instruct at 2K, 4K and 8K tokens: dense attention, InfLLM v2
    without any training, the window alone, and random blocks, at three budgets. Prints answers
    right, mean NLL of the right answer in nats per token, and blocks visited. Finished cells are
    kept: a killed run goes on."""
    import testbed

    texts, budgets = TEXTS, list(BUDGETS)
    if quick:
        texts, budgets = {"niah_multikey_1": {768: 1}}, ["256 + 4"]
    cells = Cells(
        "ruler",
        out or (QUICK if quick else HERE),
        {
            "texts": texts,
            "budgets": budgets,
            "new_tokens": NEW_TOKENS,
            "dtype": str(testbed.quick_dtype()).removeprefix("torch."),
        },
        minutes,
    )
    if not cells.fill(plan(texts, budgets)):
        return
    facts = summary(cells.cells)
    cells.save(summary=facts)
    print(show(facts))
    print(plot(facts, cells))


if __name__ == "__main__":
    run(app)

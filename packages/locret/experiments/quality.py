"""What compression costs on RULER tasks: NLL of the right answer, by scorer, option and budget.

`hidden`: the context is compressed before the question is read; `both` is the heads' score and
KeyDiff's together. `known`: the question is the last of what is compressed, so scorers that look at
the last queries see it; for Locret-Q it also stands first. `learned`: what heads learn from, the
question hidden. `original`: keys stay at their places in the text, and (`by-head`) a layer's budget
is shared among its heads. `options`: entries coded, merged or shared differently. In a group all
keep the same number of entries, read in the same chunks, with the same protected first and newest
entries; only `snapkv-once` reads its prompt in one piece, with the memory of all of it.

Heads: `heads` learned from prose. `heads-facts`: half from prose, half from prose with facts that
are asked for at its end (locret.facts; none of RULER's form). `heads-attention`: the same texts,
and labels that are attention weights, where the paper's are scores before the softmax.
`heads-repeats`: also texts that are said twice, in place of prose; the default of `locret train`.
`locret-q`: half from prose, half from RULER tasks other than those measured here, with the question
first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shared import (
    HERE,
    PAPER,
    RUNS,
    TRAIN,
    Cells,
    parts,
    question_texts,
    smollm2_heads,
    spoken,
    texts,
    varied_texts,
)
from torch import Tensor

from locret import HeadsAndKeyDiff
from locret._cli import run
from locret.evaluate import answer_nll, sizes
from locret.generation import query_first
from locret.training import TrainConfig

TASKS = ("niah_multikey_1", "vt", "niah_single_2", "niah_multivalue")
BUDGETS = (0.25, 0.125)
# Rows that are another row's scorer with other settings.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("heads-repeats", {"storage": "int8"}),
    "int4": ("heads-repeats", {"storage": "int4"}),
    "merge": ("heads-repeats", {"merge": 0.8}),
    "by-layer": ("heads-repeats", {"budgets": "layer"}),
    "by-head": ("heads-repeats", {"budgets": "head"}),
    "original": ("heads-repeats", {"positions": "original"}),
    "original-by-head": ("heads-repeats", {"positions": "original", "budgets": "head"}),
    "keydiff-original-by-head": ("keydiff", {"positions": "original", "budgets": "head"}),
}
# (names, budgets) of each group; the first name is what the others are compared with.
GROUPS = {
    "hidden": (("both", "heads", "keydiff", "random", "streaming", "expected", "snapkv",
                "keynorm"), BUDGETS),
    "known": (("locret-q", "keydiff", "snapkv", "snapkv-once", "heads"), BUDGETS),
    "learned": (("heads-repeats", "heads-attention", "heads-facts"), BUDGETS),
    "original": (("heads-repeats", "original", "original-by-head", "keydiff-original-by-head"),
                 BUDGETS),
    "options": (("heads-repeats", "int8", "int4", "merge", "by-layer", "by-head"), BUDGETS[1:]),
}  # fmt: skip
# How heads are made: their texts, and how they learn from them.
FACTS = partial(varied_texts, repeats=0.0)
MAKE: dict[str, tuple[Callable, TrainConfig]] = {
    "heads": (texts, PAPER),
    "heads-facts": (FACTS, PAPER),
    "heads-attention": (FACTS, TRAIN),
    "heads-repeats": (varied_texts, TRAIN),
    "locret-q": (question_texts, PAPER),
}
FULL = "hidden full 1"
TOKENS, CHUNK, BLOCK = 1024, 256, 4

app = typer.Typer(add_completion=False)


def arms(group: str) -> list[str]:
    """ "mode scorer budget" of a group, the full cache first."""
    names, budgets = GROUPS[group]
    mode = "known" if group == "known" else "hidden"
    return [FULL, *(f"{mode} {name} {budget:g}" for budget in budgets for name in names)]


def plan(
    tasks: list[str], groups: list[str], samples: int, heads: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Callable]]:
    """Names and computations of all cells, group after group; its tasks get on alike."""
    loaded: dict[Any, Any] = {}

    def cell(task: str, start: int, arm: str) -> list[float]:
        import testbed

        if "model" not in loaded:
            loaded["model"] = testbed.smollm2(dtype)
        model, tokenizer = loaded["model"]
        if (task, start) not in loaded:
            every = testbed.ruler(task, TOKENS, start + BLOCK, 0, tokenizer)[start:]
            loaded[task, start] = [parts(sample, tokenizer) for sample in every]
        mode, name, budget = arm.split()
        found = []
        for context, question, gold in loaded[task, start]:
            prompt, rest, config = asked(mode, name, float(budget), context, question, tokenizer)
            base = SETTINGS.get(name, (name,))[0]
            eye = heads.get(base, {"full": None, "snapkv-once": "snapkv"}.get(base, base))
            found.append(round(answer_nll(model, eye, prompt, rest, gold, config), 4))
        return found

    for group in groups:
        for start in range(0, samples, BLOCK):
            for task in tasks:
                for arm in arms(group):
                    yield f"{task} | {arm} | {start}", partial(cell, task, start, arm)


def asked(
    mode: str, name: str, budget: float, context: Tensor, question: Tensor, tokenizer: Any
) -> tuple[Tensor, Tensor, Any]:
    """What is compressed, what is read after it, and how."""
    config = sizes(round(budget * len(context)), CHUNK)
    if name in SETTINGS:
        config = replace(config, **SETTINGS[name][1])
    if mode == "hidden":
        return context, question, config
    prompt = torch.cat([context, question])
    if name == "snapkv-once":
        config = replace(config, chunk=len(prompt), local=0)
    if name == "locret-q":
        first, config = query_first(spoken(question, tokenizer)[None], prompt[None], config)
        prompt = first[0]
    return prompt, question[:0], config


def gathered(cells: dict[str, list[float]], group: str) -> dict[str, dict[str, list[float]]]:
    """NLL by task and arm, samples in order; only blocks that every arm of the group finished."""
    wanted, by_block = set(arms(group)), {}
    for key, values in cells.items():
        task, arm, start = key.split(" | ")
        if arm in wanted:
            by_block.setdefault((task, int(start)), {})[arm] = values
    found: dict[str, dict[str, list[float]]] = {}
    for (task, _), block in sorted(by_block.items()):
        if wanted == set(block):
            for arm in block:
                found.setdefault(task, {}).setdefault(arm, []).extend(block[arm])
    return found


def better(ours: list[float], theirs: list[float], resamples: int = 10_000) -> dict[str, float]:
    """Paired bootstrap: mean of theirs − ours, its 95 % interval, and P(ours is not better)."""
    gap = np.array(theirs) - np.array(ours)
    index = np.random.default_rng(0).integers(0, len(gap), (resamples, len(gap)))
    means = gap[index].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"gap": gap.mean(), "low": low, "high": high, "p": float((means <= 0).mean())}


def compared(group: str, by_arm: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each arm against the group's first of the same budget."""
    first = GROUPS[group][0][0]
    found = {}
    for arm in arms(group)[1:]:
        mode, name, budget = arm.split()
        if name != first:
            found[arm] = better(by_arm[f"{mode} {first} {budget}"], by_arm[arm])
    return found


def show(group: str, found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean NLL; + where the first row is better than a row, − where worse (95 %)."""
    lines = []
    names, budgets = GROUPS[group]
    for task, by_arm in found.items():
        tests = compared(group, by_arm)
        lines += [f"\n{task}, {group}, {len(by_arm[FULL])} samples, full cache "
                  f"{statistics.mean(by_arm[FULL]):.3f}\n",
                  "| scorer | " + " | ".join(f"{b:.1%} kept" for b in budgets) + " |",
                  "|---" * (1 + len(budgets)) + "|"]  # fmt: skip
        mode = arms(group)[1].split()[0]
        for name in names:
            row = [name]
            for budget in budgets:
                arm = f"{mode} {name} {budget:g}"
                gap = tests.get(arm, {"low": 0, "high": 0})
                sign = "+" if gap["low"] > 0 else "−" if gap["high"] < 0 else ""
                row.append(f"{statistics.mean(by_arm[arm]):.3f}{sign}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


@app.command()
def main(
    task: Annotated[list[str] | None, typer.Option(help="RULER task; repeat it.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(GROUPS)}; repeat it. [all]")
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = 64,
    minutes: Annotated[float, typer.Option(help="Start nothing later; run again to go on.")] = 1e9,
    windows: Annotated[int, typer.Option(help="Texts the heads are trained on.")] = 128,
    heads: Annotated[Path, typer.Option(help="Folder of the heads; made if missing.")] = RUNS,
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16 or float32.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="The results' file.")] = HERE / "results/quality.json",
) -> None:
    """RULER on SmolLM2-135M-Instruct at 1K tokens, 25 % and 12.5 % kept: NLL of the right answer
    after compression by trained heads and by training-free scorers, the question hidden or known.
    Prints the tables of what is finished; run again to go on."""
    if unknown := set(group or ()) - set(GROUPS):
        raise ValueError(f"--group must be one of {', '.join(GROUPS)}, got {unknown.pop()!r}")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype must be bfloat16 or float32, got {dtype!r}")
    kind = getattr(torch, dtype)
    names = {name for chosen in group or GROUPS for name in GROUPS[chosen][0]}
    wanted = {SETTINGS.get(name, (name,))[0] for name in names}
    trained = {
        name: smollm2_heads(windows, heads / name, config, make, kind)
        for name, (make, config) in MAKE.items()
        if name in wanted
    }
    overlap = {name: facts["overlap"] for name, (_, facts) in trained.items()}
    settings = {"tokens": TOKENS, "chunk": CHUNK, "dtype": dtype, "overlap": overlap}
    cells = Cells(out, settings, minutes)
    eyes: dict[str, Any] = {name: found for name, (found, _) in trained.items()}
    if "heads" in eyes:
        eyes["both"] = HeadsAndKeyDiff(eyes["heads"])
    cells.fill(plan(list(task or TASKS), list(group or GROUPS), samples, eyes, kind))
    found = {group: gathered(cells.cells, group) for group in GROUPS}
    cells.save(
        tests={
            group: {task: compared(group, by_arm) for task, by_arm in by_task.items()}
            for group, by_task in found.items()
        }
    )
    for group, by_task in found.items():
        print(show(group, by_task))


if __name__ == "__main__":
    run(app)

"""What compression costs on RULER tasks: NLL of the right answer, by scorer and budget.

`hidden`: the context is compressed before the question is read. `known`: the question is the last
of what is compressed, so scorers that look at the last queries see it. All scorers keep the same
number of entries, read in the same chunks, with the same protected first and newest entries.
`heads-q` is Locret-Q without its training: the question also stands before the context, so that
the activations that the heads read know it. `heads-int8` keeps keys and values as 8-bit integers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shared import HERE, Cells, smollm2_heads
from torch import Tensor

from locret._cli import run
from locret.evaluate import answer_nll, sizes

TASKS = ("niah_multikey_1", "niah_single_2", "vt", "niah_multivalue")
BUDGETS = (0.25, 0.125)
HIDDEN = ("heads", "streaming", "keynorm", "keydiff", "random", "expected", "snapkv",
          "heads-int8")  # fmt: skip
KNOWN = ("heads", "heads-q", "snapkv", "expected", "streaming")
OURS = ("heads", "heads-q", "heads-int8")
TOKENS, CHUNK, BLOCK = 1024, 256, 4

app = typer.Typer(add_completion=False)


def parts(sample: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the context, of the question with the answer's opening, and of the answer."""
    import testbed

    text = testbed.ruler_prompt(sample, tokenizer)
    cut = [m.start() for m in re.finditer(r"\n(What|Question:)", text)][-1]
    gold = " " + ", ".join(sample.answers)
    ids = lambda t: torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"])  # noqa: E731
    return ids(text[:cut]), ids(text[cut:]), ids(gold)


def arms() -> Iterator[tuple[str, str, float]]:
    """(mode, scorer, budget); the full cache first."""
    yield "hidden", "full", 1.0
    for budget in BUDGETS:
        yield from (("hidden", name, budget) for name in HIDDEN)
        yield from (("known", name, budget) for name in KNOWN)


def plan(tasks: list[str], samples: int, heads: Any) -> Iterator[tuple[str, Callable]]:
    """Names and computations of all cells: all arms of a few samples before the next samples."""
    loaded: dict[Any, Any] = {}

    def cell(task: str, start: int, mode: str, name: str, budget: float) -> list[float]:
        import testbed

        if "model" not in loaded:
            loaded["model"] = testbed.smollm2(torch.bfloat16)  # for all arms alike
        model, tokenizer = loaded["model"]
        if (task, start) not in loaded:
            every = testbed.ruler(task, TOKENS, start + BLOCK, 0, tokenizer)[start:]
            loaded[task, start] = [parts(sample, tokenizer) for sample in every]
        eye = {"full": None, **dict.fromkeys(OURS, heads)}.get(name, name)
        found = []
        for context, question, gold in loaded[task, start]:
            config = sizes(round(budget * len(context)), CHUNK)
            if name == "heads-int8":
                config = replace(config, storage="int8")
            if mode == "known":
                end = tokenizer.convert_tokens_to_ids("<|im_end|>")
                asked = question[: int((question == end).nonzero()[0])]  # without the template
                first = asked if name == "heads-q" else question[:0]
                context, question = torch.cat([first, context, question]), question[:0]
            nll = answer_nll(model, eye, context, question, gold, config)
            found.append(round(nll, 4))
        return found

    for start in range(0, samples, BLOCK):
        for task in tasks:
            for mode, name, budget in arms():
                args = (task, start, mode, name, budget)
                yield f"{task} | {mode} {name} {budget:g} | {start}", lambda a=args: cell(*a)


def gathered(cells: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """NLL by task and arm, samples in order; only blocks of which every arm is finished."""
    wanted = {f"{mode} {name} {budget:g}" for mode, name, budget in arms()}
    by_block: dict[tuple[str, int], dict[str, list[float]]] = {}
    for key, values in cells.items():
        task, arm, start = key.split(" | ")
        by_block.setdefault((task, int(start)), {})[arm] = values
    found: dict[str, dict[str, list[float]]] = {}
    for (task, _), block in sorted(by_block.items()):
        if wanted <= set(block):
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


def show(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean NLL, and where the heads are better (+) or worse (−) with p < 0.05."""
    lines = []
    for task, by_arm in found.items():
        count = len(by_arm["hidden full 1"])
        full = statistics.mean(by_arm["hidden full 1"])
        lines += [f"\n{task}, {count} samples, full cache {full:.3f}\n",
                  "| scorer | " + " | ".join(f"{m} {b:.1%}" for m in ("hidden", "known")
                                              for b in BUDGETS) + " |",
                  "|---" * (1 + 2 * len(BUDGETS)) + "|"]  # fmt: skip
        for name in (*HIDDEN, "heads-q"):
            row = [name]
            for mode in ("hidden", "known"):
                for budget in BUDGETS:
                    values = by_arm.get(f"{mode} {name} {budget:g}")
                    if values is None:
                        row.append("")
                        continue
                    gap = better(by_arm[f"{mode} heads {budget:g}"], values)
                    sign = "+" if gap["low"] > 0 else "−" if gap["high"] < 0 else ""
                    row.append(f"{statistics.mean(values):.3f}{sign}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


@app.command()
def main(
    task: Annotated[list[str] | None, typer.Option(help="RULER task; repeat it.")] = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = 64,
    minutes: Annotated[float, typer.Option(help="Start nothing later; run again to go on.")] = 1e9,
    windows: Annotated[int, typer.Option(help="Texts the heads are trained on.")] = 128,
    out: Annotated[Path, typer.Option(help="The results' file.")] = HERE / "results/quality.json",
) -> None:
    """RULER on SmolLM2-135M-Instruct at 1K tokens, 25 % and 12.5 % kept: NLL of the right answer
    after compression by trained heads and by training-free scorers, the question hidden or known.
    Prints the table of what is finished; run again to go on."""
    heads, facts = smollm2_heads(windows)
    settings = {"tokens": TOKENS, "chunk": CHUNK, "dtype": "bfloat16", "heads": facts["overlap"]}
    cells = Cells(out, settings, minutes)
    cells.fill(plan(list(task or TASKS), samples, heads))
    found = gathered(cells.cells)
    cells.save(
        tests={
            t: {arm: better(by_arm[f"{arm.split()[0]} heads {arm.split()[2]}"], values)
                for arm, values in by_arm.items() if arm.split()[1] not in ("full", "heads")}
            for t, by_arm in found.items()
        }
    )  # fmt: skip
    print(show(found))


if __name__ == "__main__":
    run(app)

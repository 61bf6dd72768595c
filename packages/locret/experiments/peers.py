"""What kvpress' own presses lose on the samples of quality.py, question hidden, beside our heads.

kvpress wants an older transformers, so an environment of its own, made as the README says under
"In kvpress", and with testbed:

    kvpress/bin/pip install ./packages/testbed && kvpress/bin/testbed fetch
    kvpress/bin/python packages/locret/experiments/peers.py --heads runs/locret/heads-repeats

A press reads the context in one piece with its full cache and then drops entries: the memory is
not bounded, and no later chunk has missed what was dropped. `heads` and `heads, AdaKV` are our
`LocretPress`. `heads, bounded` are quality.py's rows, where the same heads read in chunks within
the bound. KVzip reads the context twice. Not here: presses that need downloaded weights (KVzap,
FastKVzip, QFilter, DuoAttention), and those that need the question (Finch).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality import BLOCK, BUDGETS, TOKENS, better
from shared import HERE, RUNS, Cells, parts
from torch import Tensor
from torch.nn.functional import cross_entropy

from locret._cli import run

TASKS = ("niah_multikey_1", "vt")
# Rows of quality.py; the first is what the presses are compared with.
OURS = {
    "heads, bounded, original places": "original",
    "heads, bounded, original places, by head": "original-by-head",
    "heads, bounded": "heads-repeats",
}
BEST = "KVzip"  # of kvpress' presses

app = typer.Typer(add_completion=False)


def presses(heads: Path) -> dict[str, Callable[[float], Any]]:
    """By name, a press for the share of the entries that goes; kvpress' own defaults."""
    import kvpress

    from locret.press import LocretPress

    expected = partial(kvpress.ExpectedAttentionPress, epsilon=1e-2)
    return {
        "heads": partial(LocretPress, heads=heads),
        "heads, AdaKV": lambda ratio: kvpress.AdaKVPress(LocretPress(ratio, heads=heads)),
        "KVzip": kvpress.KVzipPress,
        "KeyDiff": kvpress.KeyDiffPress,
        "ExpectedAttention": kvpress.ExpectedAttentionPress,
        # The best of kvpress' leaderboard that learns nothing.
        "ExpectedAttention, AdaKV": lambda ratio: kvpress.AdaKVPress(expected(ratio)),
        "Compactor": kvpress.CompactorPress,
        "LeverageScore": kvpress.LeverageScorePress,
        "NonCausalAttn": kvpress.NonCausalAttnPress,
        "CUR": kvpress.CURPress,
        "LagKV": kvpress.LagKVPress,
        "SnapKV": kvpress.SnapKVPress,
        "PyramidKV": kvpress.PyramidKVPress,
        "TOVA": kvpress.TOVAPress,
        "Knorm": kvpress.KnormPress,
        "StreamingLLM": kvpress.StreamingLLMPress,
        "Random": kvpress.RandomPress,
    }


@torch.no_grad()
def nll(model: Any, press: Any, context: Tensor, question: Tensor, gold: Tensor) -> float:
    """Mean NLL of the answer, nats a token, as kvpress' pipeline would give it the question."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with press(model):
        model.model(input_ids=context[None], past_key_values=cache)
    rest = torch.cat([question, gold])[:-1][None]
    places = torch.arange(len(context), len(context) + rest.shape[1])[None]
    logits = model(
        input_ids=rest, past_key_values=cache, position_ids=places, logits_to_keep=len(gold)
    ).logits[0]
    return cross_entropy(logits.float(), gold).item()


def plan(
    heads: Path, tasks: list[str], names: list[str], samples: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable]]:
    """Names and computations of all cells; presses and tasks get on alike."""
    made = presses(heads)
    loaded: dict[Any, Any] = {}

    def cell(task: str, name: str, budget: float, start: int) -> list[float]:
        import testbed

        if "model" not in loaded:
            loaded["model"] = testbed.smollm2(dtype)
            # KVzip looks for the tokenizer there.
            loaded["model"][0].config.name_or_path = str(testbed.smollm2_path())
        model, tokenizer = loaded["model"]
        every = testbed.ruler(task, TOKENS, start + BLOCK, 0, tokenizer)[start:]
        torch.manual_seed(0)  # for RandomPress
        return [
            round(nll(model, made[name](1 - budget), *parts(sample, tokenizer)), 4)
            for sample in every
        ]

    for start in range(0, samples, BLOCK):
        for task in tasks:
            for name in names:
                for budget in BUDGETS:
                    key = f"{task} | {name} {budget:g} | {start}"
                    yield key, partial(cell, task, name, budget, start)


def gathered(cells: dict[str, list[float]], task: str, arm: str) -> list[float]:
    """NLL of an arm's samples, in order, as far as there is no gap."""
    found: list[float] = []
    while values := cells.get(f"{task} | {arm} | {len(found)}"):
        found += values
    return found


def show(cells: dict[str, list[float]], ours: dict[str, list[float]], names: list[str]) -> str:
    """Markdown by task; + where the first of `OURS` is better on the samples both have, − worse;
    and how far `BEST` of kvpress' own is from our two ways of using the heads.
    """
    lines: list[str] = []
    shares = " | ".join(f"{b:.1%} kept" for b in BUDGETS)
    for task in TASKS:
        lines += [f"\n{task}\n", f"| press | samples | {shares} |"]
        lines.append("|---" * (2 + len(BUDGETS)) + "|")
        rows = {
            name: {b: gathered(ours, task, f"hidden {arm} {b:g}") for b in BUDGETS}
            for name, arm in OURS.items()
        }
        first = rows[next(iter(OURS))]
        rows |= {n: {b: gathered(cells, task, f"{n} {b:g}") for b in BUDGETS} for n in names}
        for name, found in rows.items():
            if not all(found.values()):
                continue
            row = [name, str(min(map(len, found.values())))]
            for budget, theirs in found.items():
                both = min(len(theirs), len(first[budget]))
                gap = better(first[budget][:both], theirs[:both]) if both else {"low": 0, "high": 0}
                sign = "+" if gap["low"] > 0 else "−" if gap["high"] < 0 else ""
                row.append(f"{statistics.mean(theirs):.3f}{sign}")
            lines.append("| " + " | ".join(row) + " |")
        for name in (next(iter(OURS)), "heads, AdaKV"):
            for budget in BUDGETS:
                pair = [rows.get(n, {}).get(budget, []) for n in (name, BEST)]
                both = min(map(len, pair))
                if both:
                    gap = better(*(values[:both] for values in pair))
                    interval = f"{gap['low']:+.3f} to {gap['high']:+.3f}"
                    lines.append(
                        f"- {BEST} − {name} at {budget:.1%}: {gap['gap']:+.3f} ({interval})"
                    )
    return "\n".join(lines)


@app.command()
def main(
    heads: Annotated[Path, typer.Option(help="quality.py's heads.")] = RUNS / "heads-repeats",
    task: Annotated[list[str] | None, typer.Option(help="RULER task; repeat it.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="Row; repeat it. [all]")] = None,
    samples: Annotated[int, typer.Option(help="Of each task.")] = 64,
    minutes: Annotated[float, typer.Option(help="Start nothing later; run again to go on.")] = 1e9,
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16 or float32.")] = "bfloat16",
    ours: Annotated[
        Path, typer.Option(help="quality.py's results of `--group original`, in the same dtype.")
    ] = HERE / "results/quality-learned.json",
    out: Annotated[Path, typer.Option(help="The results' file.")] = HERE / "results/peers.json",
) -> None:
    """kvpress' presses on quality.py's samples: NLL of the right answer, question hidden."""
    known = list(presses(heads))
    if unknown := set(press or ()) - set(known):
        raise ValueError(f"--press must be one of {', '.join(known)}, got {unknown.pop()!r}")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype must be bfloat16 or float32, got {dtype!r}")
    from importlib.metadata import version

    settings = {"tokens": TOKENS, "dtype": dtype, "kvpress": version("kvpress")}
    cells = Cells(out, settings, minutes)
    names = list(press or known)
    cells.fill(plan(heads, list(task or TASKS), names, samples, getattr(torch, dtype)))
    stored = json.loads(ours.read_text(encoding="utf-8")) if ours.exists() else {"cells": {}}
    print(show(cells.cells, stored["cells"], known))


if __name__ == "__main__":
    run(app)

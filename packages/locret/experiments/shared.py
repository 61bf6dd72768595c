"""What the experiments share: results that survive a kill, and SmolLM2's heads."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locret import RetainingHeads
from locret.data import QUERY, asked, examples, varied
from locret.training import Example, TrainConfig, train

HERE = Path(__file__).parent
RUNS = Path("runs/locret")
CORPORA = ("wikipedia", "essays", "reference", "news")
TRAIN = TrainConfig(hidden=256, epochs=8)
PAPER = replace(TRAIN, labels="scores")
# What Locret-Q is trained on beside prose; the tasks that are measured are none of them.
TASKS = ("niah_single_1", "niah_single_3", "niah_multikey_2", "niah_multiquery")


def texts(tokenizer: Any, count: int, length: int = 1024, answer: int = 128) -> list[Example]:
    """`count` windows of real text; the last eighth from documents that no other window is of."""
    import testbed

    found: list[Example] = []
    unseen = max(1, round(count * TRAIN.held_out))
    for split, wanted in (("train", count - unseen), ("test", unseen)):
        documents = [[d.text for d in testbed.corpus(name, split)] for name in CORPORA]
        # A few long documents of each register, in turn.
        long = [[t for t in texts if len(t) > 5 * length][: 2 * wanted] for texts in documents]
        mixed = [t for turn in range(2 * wanted) for c in long for t in c[turn : turn + 1]]
        found += examples(mixed[: 2 * wanted], tokenizer, length=length, answer=answer,
                          count=wanted)  # fmt: skip
    return found


def parts(sample: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the context, of the question with the answer's opening, and of the answer."""
    import testbed

    text = testbed.ruler_prompt(sample, tokenizer)
    cut = [m.start() for m in re.finditer(r"\n(What|Question:)", text)][-1]
    gold = " " + ", ".join(sample.answers)
    ids = lambda t: torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"])  # noqa: E731
    return ids(text[:cut]), ids(text[cut:]), ids(gold)


def spoken(question: Tensor, tokenizer: Any) -> Tensor:
    """A question of `parts` without the chat template that follows it."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return question[: int((question == end).nonzero()[0])]


def question_texts(tokenizer: Any, count: int, length: int = 1024) -> list[Example]:
    """For Locret-Q: half windows of `texts`, half RULER samples of tasks that are not measured.

    The end of a sample, whose rows make the labels, is its question and answer, and the question
    also stands first. The last eighth is of unseen documents and other seeds.
    """
    import testbed

    unseen = max(1, round(count * TRAIN.held_out))
    prose = [asked(e.ids, e.answer, QUERY) for e in texts(tokenizer, count // 2, length)]
    cut = count // 2 - max(1, round(count // 2 * TRAIN.held_out))
    found: list[Example] = []
    for plain, seed, wanted in ((prose[:cut], 1000, count - unseen), (prose[cut:], 2000, unseen)):
        each = -(-(wanted - len(plain)) // len(TASKS))
        samples = [testbed.ruler(t, length, each, seed, tokenizer) for t in TASKS]
        mixed = []
        for sample in [s for turn in zip(*samples, strict=True) for s in turn]:
            context, question, gold = parts(sample, tokenizer)
            first = spoken(question, tokenizer)
            ids = torch.cat([first, context, question, gold])
            mixed.append(Example(ids, len(question) + len(gold), len(first)))
        pairs = zip(plain, mixed[: len(plain)], strict=True)
        found += [e for pair in pairs for e in pair] + mixed[len(plain) : wanted - len(plain)]
    return found


def varied_texts(
    tokenizer: Any, count: int, length: int = 1024, repeats: float = 0.5
) -> list[Example]:
    """`texts`, every second one with facts that are asked for at its end, `repeats` of them twice.

    The last eighth is of unseen documents, with facts of other seeds.
    """
    return varied(texts(tokenizer, count, length), 0.5, repeats, tokenizer)


def smollm2_heads(
    count: int = 128, folder: Path = RUNS / "heads", config: TrainConfig = TRAIN,
    make: Callable[[Any, int], list[Example]] = texts, dtype: torch.dtype = torch.bfloat16,
) -> tuple[RetainingHeads, dict[str, Any]]:  # fmt: skip
    """SmolLM2's heads, trained on first use; a killed training goes on. And how they rank."""
    if not (folder / "heads.json").exists():
        import testbed

        model, tokenizer = testbed.smollm2(dtype)
        began = time.perf_counter()

        def progress(text: str, done: float) -> None:
            print(f"{done:4.0%} {text}, {time.perf_counter() - began:.0f} s", flush=True)

        windows = make(tokenizer, count)
        heads, facts = train(model, windows, config, folder / "work", progress)
        heads.save(folder, seconds=round(time.perf_counter() - began, 1), **facts)
    facts = json.loads((folder / "heads.json").read_text(encoding="utf-8"))
    return RetainingHeads.load(folder), facts


@dataclass
class Cells:
    """Results by cell in a JSON file, written whenever a cell is finished.

    Args:
        path: of the file.
        settings: what all cells depend on; a file made with others is refused.
        minutes: start no cell later than this; the next run goes on.
    """

    path: Path
    settings: dict[str, Any]
    minutes: float = float("inf")
    cells: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Read what earlier runs finished."""
        self.settings = json.loads(json.dumps(self.settings))
        if not self.path.exists():
            return
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        if stored["settings"] != self.settings:
            raise ValueError(
                f"{self.path} was made with other settings ({stored['settings']}): delete it, or "
                "choose another --out"
            )
        self.cells = stored["cells"]

    def fill(self, plan: Iterable[tuple[str, Callable[[], Any]]]) -> bool:
        """Compute the cells that are missing, in order; whether none is missing any more."""
        plan = list(plan)
        missing = [(name, compute) for name, compute in plan if name not in self.cells]
        for at, (name, compute) in enumerate(missing):
            if time.monotonic() - self.began > 60 * self.minutes:
                print(f"{len(missing) - at} of {len(plan)} cells left: run the same command again")
                return False
            started = time.monotonic()
            self.cells[name] = compute()
            self.save()
            seconds = time.monotonic() - started
            done = len(plan) - len(missing) + at + 1
            print(f"[{done}/{len(plan)}] {name}  {seconds:.1f} s", flush=True)
        return True

    def save(self, **more: Any) -> None:
        """Write the file, with further entries such as a summary; whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".partial")
        facts = {"settings": self.settings, "torch": torch.__version__, **more}
        text = json.dumps({**facts, "cells": self.cells}, indent=1)
        scratch.write_text(text + "\n", encoding="utf-8")
        os.replace(scratch, self.path)

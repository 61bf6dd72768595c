"""What the experiments share: results that survive a kill, and SmolLM2's heads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from locret import RetainingHeads
from locret.data import examples
from locret.training import Example, TrainConfig, train

HERE = Path(__file__).parent
RUNS = Path("runs/locret")
CORPORA = ("wikipedia", "essays", "reference", "news")
TRAIN = TrainConfig(hidden=256, epochs=8)


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


def smollm2_heads(
    count: int = 128, folder: Path = RUNS / "heads", config: TrainConfig = TRAIN
) -> tuple[RetainingHeads, dict[str, Any]]:
    """SmolLM2's heads, trained on first use; a killed training goes on. And how they rank."""
    if not (folder / "heads.json").exists():
        import testbed

        model, tokenizer = testbed.smollm2(torch.bfloat16)
        began = time.perf_counter()

        def progress(text: str, done: float) -> None:
            print(f"{done:4.0%} {text}, {time.perf_counter() - began:.0f} s", flush=True)

        windows = texts(tokenizer, count)
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

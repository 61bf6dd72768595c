"""What the experiments share: results that survive a kill, the real model, and the controls."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm2 import InfLLMv2Config, select_blocks
from infllm2.attention import Select

HERE = Path(__file__).parent
QUICK = Path("runs/infllm2-quick")  # smoke runs must not touch the results in the repository
NEVER = 1 << 30  # as `dense_len`: always dense, by the same kernels as sparse


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def environment() -> dict[str, Any]:
    """Processor, threads and versions: what the seconds depend on."""
    import transformers

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Later(Exception):
    """Raised by a cell that has saved its state and wants to go on in the next run."""


@dataclass
class Cells:
    """Results by cell in `<folder>/results/<name>.json`, written whenever a cell is finished.

    Args:
        name: of the experiment.
        folder: holds `results/` and `figures/`.
        settings: what all cells depend on; a file made with others is refused.
        minutes: start no cell later than this; the next run goes on.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    minutes: float = float("inf")
    cells: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Read what earlier runs finished."""
        self.settings = json.loads(json.dumps(self.settings))
        self.path = self.folder / "results" / f"{self.name}.json"
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
            if self.late():
                print(f"{len(missing) - at} of {len(plan)} cells left: run the same command again")
                return False
            started = time.monotonic()
            try:
                self.cells[name] = compute()
            except Later:
                print(f"{name} is not finished: run the same command again")
                return False
            self.save()
            seconds = time.monotonic() - started
            done = len(plan) - len(missing) + at + 1
            print(f"[{done}/{len(plan)}] {name}  {seconds:.1f} s", flush=True)
        return True

    def late(self) -> bool:
        """Whether the time of this run is over."""
        return time.monotonic() - self.began > 60 * self.minutes

    def save(self, **more: Any) -> None:
        """Write the file, with further entries such as a summary."""
        facts = {"experiment": self.name, "settings": self.settings, "env": environment()}
        write_json(self.path, {**facts, **more, "cells": self.cells})

    def figure(self, figure: Any) -> Path:
        """Save a matplotlib figure as `<folder>/figures/<name>.png`."""
        path = self.folder / "figures" / f"{self.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".partial")
        figure.savefig(scratch, dpi=110, bbox_inches="tight", format="png")
        os.replace(scratch, path)
        return path


def budget(window: int, topk: int, **more: Any) -> InfLLMv2Config:
    """A configuration that is sparse at every length."""
    return InfLLMv2Config(window_size=window, topk=topk, **{"dense_len": -1, **more})


def window_alone(config: InfLLMv2Config) -> InfLLMv2Config:
    """The same number of blocks without a choice: the initial ones and a longer window."""
    blocks = config.budget - config.init_blocks
    return replace(config, topk=config.init_blocks, window_size=blocks * config.block_size)


def dense(config: InfLLMv2Config) -> InfLLMv2Config:
    """The same sizes, always dense."""
    return replace(config, dense_len=NEVER)


def random_blocks(seed: int) -> Select:
    """Blocks for `sparse(..., select=)`: initial and window as ever, the others at random."""
    generator = torch.Generator().manual_seed(seed)

    def select(q: Tensor, k: Tensor, config: InfLLMv2Config) -> Tensor:
        T, S = q.shape[2], k.shape[2]
        count = -(-S // config.block_size)
        block = torch.arange(count)
        back = (torch.arange(S - T, S) // config.block_size)[:, None] - block
        scores = torch.rand(q.shape[0], k.shape[1], T, count, generator=generator)
        scores.masked_fill_((block < config.init_blocks) | (back < config.window_blocks), 2.0)
        scores.masked_fill_(back < 0, -1.0)
        best, index = scores.topk(min(config.budget, count), -1)
        index = index.masked_fill(best < 0, count).sort(-1).values
        return index.masked_fill(index == count, -1).int()

    return select


def capture(into: list[tuple[Tensor, Tensor]]) -> Select:
    """For `sparse(..., select=)`: keeps every layer's (q, k), and chooses as InfLLM v2 does."""

    def select(q: Tensor, k: Tensor, config: InfLLMv2Config) -> Tensor:
        into.append((q.clone(), k.clone()))
        return select_blocks(q, k, config)

    return select


def long_texts(corpus: str, split: str, tokens: int, tokenizer: Any) -> list[Tensor]:
    """Pieces of exactly `tokens` ids, int64 `[1, tokens]`, from documents that are long enough.

    Pieces follow each other within a document and none holds two documents.
    """
    import testbed

    pieces = []
    for document in testbed.corpus(corpus, split):
        ids = torch.tensor(tokenizer(document.text)["input_ids"], dtype=torch.long)
        pieces += [piece[None] for piece in ids.split(tokens) if len(piece) == tokens]
    if not pieces:
        raise ValueError(f"no document of {corpus}/{split} has {tokens} tokens: ask for fewer")
    return pieces


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

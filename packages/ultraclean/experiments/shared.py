"""Text of the experiments, and one JSON file for each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import testbed

RESULTS = Path(__file__).parent / "results"
PROSE = ("wikipedia", "news", "essays", "reference")
NOISE = ("wiki_markup", "newsgroups", "reviews")


def passages(name: str, split: str = "all", length: int = 2000, least: int = 200) -> list[str]:
    """A corpus of the testbed, its documents cut into passages."""
    texts = (d.text for d in testbed.corpus(name, split))
    cut = (text[i : i + length] for text in texts for i in range(0, len(text), length))
    return [passage for passage in cut if len(passage) >= least]


def sampled(texts: Iterable[str], most: int, seed: int) -> list[str]:
    """At most so many of the texts, in any order."""
    kept = list(texts)
    return random.Random(seed).sample(kept, min(most, len(kept)))


def save(name: str, result: dict[str, Any]) -> None:
    """Into `results/`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")

"""Thresholds for a budget: which score keeps which share of a corpus."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ultraclean.classifier import Classifier
from ultraclean.evaluate import threshold_for_budget
from ultraclean.filter import format_of
from ultraclean.heuristics import Heuristics, judge
from ultraclean.jsonl import LONGEST
from ultraclean.ordered import ahead, in_order


def thresholds_for_corpus(
    inputs: Iterable[str | os.PathLike[str]],
    classifier: Classifier,
    keep: Sequence[float],
    *,
    text_key: str = "text",
    min_chars: int = 0,
    drop_duplicates: bool = False,
    by: str = "characters",
    workers: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The thresholds at which `filter_corpus` keeps the best-scoring shares of all text.

    Reads everything once, malformed rows aside, and holds 16 bytes a text. The share is of what
    the heuristics leave; the other arguments are as for `filter_corpus`.

    Args:
        keep: shares of the total, each in (0, 1].
        by: what is counted: `characters`, `tokens` (of the classifier's tokenizer; words where it
            has none) or `texts`, which makes it a percentile.

    Raises:
        ValueError: no usable text, or `keep` or `by` out of range.
    """
    if by not in ("characters", "tokens", "texts"):
        raise ValueError(f"by must be characters, tokens or texts, got {by!r}")
    files = [Path(p) for p in inputs]
    form = format_of(files, text_key, "source", LONGEST, "")
    rules = Heuristics(min_chars, drop_duplicates)
    scores, weights = array("d"), array("Q")
    read = 0
    blocks = (block for path in files for block in form.blocks(path))
    for judged in in_order(
        ahead(blocks, workers), lambda b: judge(form.parse(b), classifier, rules), workers
    ):
        reasons = rules.reasons(judged, 0.0)
        for i, problem in enumerate(judged.rows.problems):
            if not problem and not reasons[i]:
                scores.append(judged.scores[i])
                text, tokens = judged.rows.texts[i], judged.tokens[i]
                weights.append({"characters": len(text), "tokens": tokens, "texts": 1}[by])
        read += len(judged.rows.texts)
        progress(read)
    if not scores:
        raise ValueError(f"no usable text on {read} lines: nothing to set a threshold by")
    return [threshold_for_budget(scores, weights, share) for share in keep]

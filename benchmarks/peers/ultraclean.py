"""One peer of the ultraclean benchmark, run in an environment of its own.

Started as `python peers/ultraclean.py TASK ARGUMENTS…`. It says "ready"; for each line on its
standard input it does the task once and answers with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any


def texts_of(path: str) -> list[str]:
    """What the benchmark saved."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def predict(model: str, texts: str) -> Callable[[], Any]:
    """fastText's fastest way: a list at once. P(pos) of each text."""
    import fasttext

    fasttext.FastText.eprint = lambda *a, **k: None
    loaded, lines = fasttext.load_model(model), texts_of(texts)

    def run() -> list[float]:
        labels, shares = loaded.predict(lines, k=2)
        return [
            float(s[list(found).index("__label__pos")])
            for found, s in zip(labels, shares, strict=True)
        ]

    return run


def train(lines: str, texts: str, settings: str) -> Callable[[], Any]:
    """fastText's own training on a file of labelled lines. P(pos) of texts that it did not see."""
    import fasttext

    fasttext.FastText.eprint = lambda *a, **k: None
    held = texts_of(texts)

    def run() -> list[float]:
        model = fasttext.train_supervised(lines, **json.loads(settings))
        labels, shares = model.predict(held, k=2)
        return [
            float(s[list(found).index("__label__pos")])
            for found, s in zip(labels, shares, strict=True)
        ]

    return run


def recipe(model: str, texts: str, tokenizer: str) -> Callable[[], Any]:
    """Ultra-FineWeb's recipe: fold, cut with `tokenizers`, decode each id alone, join, predict."""
    import re

    import fasttext
    from tokenizers import Tokenizer

    loaded, cut, raw = fasttext.load_model(model), Tokenizer.from_file(tokenizer), texts_of(texts)

    def normalise(text: str) -> str:
        text = re.sub(r"\n{3,}", "\n\n", text).lower()
        text = "".join(
            c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn"
        )
        ids = cut.encode(text, add_special_tokens=False).ids
        text = " ".join([cut.decode([i], skip_special_tokens=False) for i in ids])
        text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        return re.sub(r" +", " ", text).strip()

    def run() -> list[float]:
        found = []
        for text in raw:
            labels, shares = loaded.predict(normalise(text))
            share = min(float(shares[0]), 1.0)
            found.append(share if labels[0] == "__label__pos" else 1.0 - share)
        return found

    return run


def pipeline(model: str, inputs: str, output: str) -> Callable[[], Any]:
    """datatrove: reader, fastText filter, writer, one task for each of two files."""
    import shutil

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import FastTextClassifierFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()

    def run() -> int:
        shutil.rmtree(output, ignore_errors=True)
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(inputs),
                FastTextClassifierFilter(
                    model, keep_labels=[("pos", 0.5)], newline_replacement=" "
                ),
                JsonlWriter(f"{output}/kept"),
            ],
            tasks=2, workers=2, logging_dir=f"{output}/logs", skip_completed=False,
        ).run()  # fmt: skip
        stats = json.loads(Path(f"{output}/logs/stats.json").read_text())[1]["stats"]
        kept = stats["forwarded"]
        return kept["total"] if isinstance(kept, dict) else kept

    return run


def minhash(texts: str) -> Callable[[], Any]:
    """datatrove's first stage: 14 × 8 minima over 5-grams of each text."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from loguru import logger

    logger.remove()
    raw, block = texts_of(texts), MinhashDedupSignature("/tmp/unused-minhash-signatures")

    def run() -> int:
        return sum(len(block.get_signature(block.get_shingles(text))) for text in raw)

    return run


def memory(model: str, texts: str) -> Callable[[], Any]:
    """MB that a process holds after it has scored, and that are nobody else's."""
    run = predict(model, texts)

    def held() -> float:
        run()
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
        return found["Rss"] / 1024

    return held


def main() -> None:
    """Do the task once for each line of standard input."""
    name, *arguments = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    run = globals()[name](*arguments)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)


if __name__ == "__main__":
    main()

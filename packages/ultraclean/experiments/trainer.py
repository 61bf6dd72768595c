"""Is our trainer as good as fastText? F1 and AUC on text that neither saw, by corpus and seed.

    python packages/ultraclean/experiments/trainer.py

Both get the same seeds in the same order, one thread, width 256, 200,000 buckets; the seed draws
the division of the text, the order, and the library's rows. Runs that are done are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from shared import NOISE, PROSE, passages, sampled, save

import ultraclean

# name -> good, bad, normaliser, rate
TASKS = {
    "prose against noise": (PROSE, NOISE, "ultrafine-words", 1.0),
    "prose against noise, the paper's rate": (PROSE, NOISE, "ultrafine-words", 0.1),
    "news against newsgroups": (("news",), ("newsgroups",), "ultrafine-words", 1.0),
    "Chinese news against reviews": (("zh_news",), ("zh_reviews",), "zh-char", 0.5),
}
SEEDS = 4
LONG = 1200


def scores(task: str, seed: int) -> dict[str, dict[str, float]]:
    """Of both trainers on one division of a task's text."""
    good_names, bad_names, normaliser, rate = TASKS[task]
    least = 20 if normaliser == "zh-char" else 200
    texts = [
        sampled((p for name in names for p in passages(name, least=least)), LONG * 2, seed)
        for names in (good_names, bad_names)
    ]
    size = min(map(len, texts))
    cut = size * 7 // 10
    held = [t for side in texts for t in side[cut:size]]
    labels = [True] * (size - cut) + [False] * (size - cut)
    found = {}
    logits = []
    for trainer in ("native", "fasttext"):
        config = ultraclean.ClassifierConfig(
            bucket=200_000, min_count=3, lr=rate, normaliser=normaliser, seed=seed, trainer=trainer
        )
        with tempfile.TemporaryDirectory() as folder:
            made = ultraclean.train(texts[0][:cut], texts[1][:cut], config, Path(folder) / "c")
            given = made.score(held)
        at = ultraclean.precision_recall_f1(given, labels, 0.5)
        found[trainer] = {"f1": at.f1, "auc": ultraclean.auc(given, labels)}
        share = given.astype(np.float64).clip(1e-4, 1 - 1e-4)
        logits.append(np.log(share / (1 - share)))
    found["correlation of logits"] = float(np.corrcoef(*logits)[0, 1])
    return found


def main() -> None:
    """Print a table, write results/trainer.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/ultraclean-trainer"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    result = {}
    for task in TASKS:
        runs = []
        for seed in range(SEEDS):
            cell = folder / f"{task}-{seed}.json"
            if not cell.is_file():
                cell.write_text(json.dumps(scores(task, seed)))
            runs.append(json.loads(cell.read_text()))
        result[task] = runs
        print(task)
        for what in ("f1", "auc"):
            ours, theirs = ([run[t][what] for run in runs] for t in ("native", "fasttext"))
            gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            print(f"  {what:4} ours {statistics.mean(ours):.4f}, fastText "
                  f"{statistics.mean(theirs):.4f}, ours - theirs {statistics.mean(gaps):+.4f} "
                  f"± {error:.4f}")  # fmt: skip
        between = statistics.mean(run["correlation of logits"] for run in runs)
        print(f"  correlation of logits {between:.4f}", flush=True)
        save("trainer", result)


if __name__ == "__main__":
    main()

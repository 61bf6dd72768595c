"""How much to keep, and how often to go round: thresholds and rounds against verified gain.

    python packages/ultraclean/experiments/thresholds.py

The setting of `pools.py`. A classifier learns from the pools that `pools.py` accepts (the best by
mean if none) against the noise, scores a crawl that mixes all registers, and what it keeps at each
budget is verified, beside the whole crawl and the best texts of an oracle that knows the sources.
Then `loop` goes round: each round's surest texts become seeds of the next.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from pools import RECIPE, base_of, texts
from shared import NOISE, PROSE, RESULTS, sampled, save

import ultraclean

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.7)
# Hundreds of seeds want more passes than the millions that the paper has.
CONFIG = ultraclean.ClassifierConfig(bucket=200_000, min_count=3, lr=1.0, epochs=15)


def main() -> None:
    """Print the tables, write results/thresholds.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/ultraclean-pools"))
    folder = parser.parse_args().folder
    mix, pools, judges = texts()
    base = base_of(folder, mix)
    # Half of each pool are seeds, the other half is in the crawl: no text is in both.
    seeds = {name: pools[name][::2] for name in (*PROSE, *NOISE)}
    crawl = [(text, name) for name in seeds for text in pools[name][1::2]]
    verified = json.loads((RESULTS / "pools.json").read_text(encoding="utf-8"))
    accepted = [name for name in verified["accepted"] if name in seeds]
    if not accepted:
        means = {g["pool"]: g["gain"] for g in verified["gains"] if g["evaluation"] == "mean"}
        accepted = [max(seeds, key=means.__getitem__)]
    good = [text for name in accepted for text in seeds[name]]
    bad = [text for name in NOISE if name not in accepted for text in seeds[name]]
    classifier = ultraclean.train(good, bad, CONFIG, folder / "classifier")
    raw = [text for text, _ in crawl]
    scores = classifier.score(raw)
    kept: dict[str, list[str]] = {}
    facts = []
    for budget in BUDGETS:
        threshold = ultraclean.threshold_for_budget(scores, [len(t) for t in raw], budget)
        chosen = [pair for pair, s in zip(crawl, scores, strict=True) if s >= threshold]
        kept[f"keep {budget:g}"] = [text for text, _ in chosen]
        prose = sum(name in PROSE for _, name in chosen) / len(chosen)
        facts.append({"keep": budget, "threshold": float(threshold), "texts": len(chosen),
                      "prose": prose})  # fmt: skip
    kept["all of it"] = raw
    kept["oracle: prose"] = [text for text, name in crawl if name in PROSE]
    found = ultraclean.verify(base, kept, mix, judges, RECIPE, folder / "thresholds")
    print(f"seeds: {', '.join(accepted)}")
    for fact in facts:
        print(f"keep {fact['keep']:g}: threshold {fact['threshold']:.4f}, {fact['texts']} texts, "
              f"{fact['prose']:.0%} of them prose")  # fmt: skip
    print("\n".join(line for line in found.table().splitlines() if "mean" in line))
    result = {"seeds": accepted, "thresholds": facts, **found.to_dict()}
    save("thresholds", result)
    report = ultraclean.loop(
        base, {name: seeds[name] for name in PROSE}, [t for n in NOISE for t in seeds[n]],
        sampled(raw, len(raw), 0), mix, judges, folder / "loop", config=CONFIG, recipe=RECIPE,
        keep=0.2, most_rounds=3, progress=lambda what: print(what, flush=True),
    )  # fmt: skip
    for number, row in enumerate(report.rounds, 1):
        print(f"round {number}: {asdict(row)}")
    print(report.stopped)
    save("thresholds", {**result, "loop": report.to_dict()})


if __name__ == "__main__":
    main()

"""The paper's tables again, from its own task scores, with what it leaves out: error bars.

    python packages/ultraclean/experiments/paper_tables.py

`paper_scores.json` holds the published scores and the sizes of the tasks' public evaluation sets.
A score p of n questions has a standard error of √(p(1−p)/n); a gain over another corpus that of
two such scores (the answers to single questions, which would pair them, are not published). It
says how far the questions may be by chance what they are; training again would add to it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shared import save

PUBLISHED = Path(__file__).parent / "paper_scores.json"


def error_of(score: float, items: int) -> float:
    """Standard error of a score in percent."""
    share = score / 100
    return 100 * math.sqrt(share * (1 - share) / items)


def table(name: str, found: dict[str, Any], items: dict[str, int]) -> dict[str, Any]:
    """Means recomputed, gains of the last corpus over the others with their errors."""
    tasks, scores = found["tasks"], found["scores"]
    *others, best = scores
    means = {corpus: sum(row) / len(row) for corpus, row in scores.items()}
    gains = {}
    for other in others:
        rows = []
        for task, a, b in zip(tasks, scores[best], scores[other], strict=True):
            rows.append((task, a - b, math.hypot(error_of(a, items[task]),
                                                 error_of(b, items[task]))))  # fmt: skip
        error = math.sqrt(sum(e * e for *_, e in rows)) / len(rows)
        gains[other] = {"mean": means[best] - means[other], "error": error,
                        "tasks": rows}  # fmt: skip
    wrong = {c: (found["means"][c], round(means[c], 3)) for c in scores
             if abs(found["means"][c] - means[c]) > 0.0051}  # fmt: skip
    return {"language": name, "means": means, "gains": gains, "means that differ": wrong}


def markdown(result: dict[str, Any], found: dict[str, Any]) -> str:
    """For reading."""
    tasks, scores = found["tasks"], found["scores"]
    best = [*scores][-1]
    lines = ["| | " + " | ".join([*tasks, "mean", "published"]) + " |",
             "|---" * (len(tasks) + 3) + "|"]  # fmt: skip
    for corpus, row in scores.items():
        cells = [f"{s:.2f}" for s in row] + [f"{result['means'][corpus]:.3f}",
                                              f"{found['means'][corpus]:g}"]  # fmt: skip
        lines.append(f"| {corpus} | " + " | ".join(cells) + " |")
    for other, gain in result["gains"].items():
        cells = [f"{g:+.2f} ± {e:.2f}" for _, g, e in gain["tasks"]]
        cells += [f"**{gain['mean']:+.2f} ± {gain['error']:.2f}**", ""]
        lines.append(f"| {best} − {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, write results/paper_tables.json."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    print(published["source"] + "\n")
    results = {}
    for name, found in published["tables"].items():
        result = table(name, found, published["items"])
        results[name] = result
        print(markdown(result, found) + "\n")
        for other, gain in result["gains"].items():
            beyond = [t for t, g, e in gain["tasks"] if g > 1.96 * e]
            below = [t for t, g, e in gain["tasks"] if g < -1.96 * e]
            print(f"over {other}: beyond 1.96 standard errors on {', '.join(beyond) or 'none'}; "
                  f"below on {', '.join(below) or 'none'}")  # fmt: skip
        print(f"means that the paper gives otherwise: {result['means that differ'] or 'none'}\n")
    hours = published["gpu_hours"]
    cheap = hours["verification, 10B tokens"]
    shares = {k: cheap / v for k, v in hours.items() if v != cheap}
    for what, share in shares.items():
        print(f"verification costs {share:.1%} of {what} (the base's own training not counted)")
    save("paper_tables", {"tables": results, "cost": shares})


if __name__ == "__main__":
    main()

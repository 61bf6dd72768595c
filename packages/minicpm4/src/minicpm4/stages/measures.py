"""What stage `clean` asks of its filter: does it rank well, and is the kept text better?"""

from __future__ import annotations

import random
from typing import Any

from minicpm4.pipeline.models import model_path
from minicpm4.pipeline.stage import Workspace, needs

# Enough of a passage to tell its quality, and a tenth of the time of all of it.
JUDGED_CHARS = 900


def by_source(kept: list[dict], dropped: list[dict]) -> list[dict[str, Any]]:
    """Passages kept and dropped of each source."""
    names = sorted({r["source"] for r in [*kept, *dropped]})
    rows = []
    for name in names:
        mine = [r for r in kept if r["source"] == name]
        others = [r for r in dropped if r["source"] == name]
        rows.append(
            {
                "source": name,
                "good": (mine or others)[0]["from_good"],
                "seen": (mine or others)[0]["seen"],
                "kept": len(mine),
                "dropped": len(others),
                "share_kept": len(mine) / (len(mine) + len(others)),
            }
        )
    return rows


def auc(kept: list[dict], dropped: list[dict], seed: int) -> dict[str, Any]:
    """How well the score tells good sources from poor: on those it learned from, on the others."""
    import ultraclean

    result = {}
    for name, seen in (("seen sources", True), ("unseen sources", False)):
        rows = [r for r in [*kept, *dropped] if r["seen"] == seen]
        labels = [bool(r["from_good"]) for r in rows]
        if len(set(labels)) < 2:
            continue  # without both kinds there is nothing to rank
        scores = [r["ultraclean_score"] for r in rows]
        value, low, high = ultraclean.bootstrap_auc(scores, labels, seed=seed)
        result[name] = {"value": value, "low": low, "high": high, "passages": len(rows)}
    return result


def histogram(kept: list[dict], dropped: list[dict]) -> dict[str, list[int]]:
    """Counts of scores in twenty equal bins, for each kind of source."""
    bins: dict[str, list[int]] = {}
    for row in [*kept, *dropped]:
        kind = "good" if row["from_good"] else "poor"
        kind += ", seen" if row["seen"] else ", unseen"
        counts = bins.setdefault(kind, [0] * 20)
        counts[min(int(row["ultraclean_score"] * 20), 19)] += 1
    return dict(sorted(bins.items()))


def judge(
    model: str, passages: int, kept: list[dict], dropped: list[dict], space: Workspace
) -> dict[str, Any]:
    """Loss per byte of a model that had no part in the choice, on passages drawn from each side."""
    with needs("cpmcu", "clean"):
        from cpmcu import Engine

    engine = Engine.from_pretrained(model_path(model), threads=space.threads)
    draw = random.Random(space.seed)
    # Only what the score decided: a duplicate is dropped whatever its quality.
    low = [r for r in dropped if r["ultraclean_reason"] == "score"]
    chosen = {
        side: draw.sample(rows, min(passages, len(rows)))
        for side, rows in (("kept", kept), ("dropped", low))
    }
    total = sum(map(len, chosen.values()))
    losses: list[float] = []
    for row in [row for rows in chosen.values() for row in rows]:
        [score] = engine.score([row["text"][:JUDGED_CHARS]])
        losses.append(-score.log_likelihood / max(1, score.bytes))
        space.progress("an LLM judges kept and dropped text", 0.5 + 0.5 * len(losses) / total)
    result: dict[str, Any] = {"model": model}
    for side, rows in chosen.items():
        mine, losses = losses[: len(rows)], losses[len(rows) :]
        mean = sum(mine) / len(mine) if mine else float("nan")
        spread = sum((x - mean) ** 2 for x in mine) / max(1, len(mine) - 1)
        result[side] = {
            "nats_per_byte": mean,
            "standard_error": (spread / max(1, len(mine))) ** 0.5,
            "passages": len(mine),
        }
    return result


def examples(kept: list[dict], dropped: list[dict]) -> dict[str, list[dict[str, Any]]]:
    """Passages at the ends and beside the threshold, where a reader learns most."""

    def show(row: dict) -> dict[str, Any]:
        return {
            "source": row["source"],
            "score": row["ultraclean_score"],
            "text": row["text"][:400],
        }

    by_score = sorted(kept, key=lambda r: (-r["ultraclean_score"], r["id"]))
    low = sorted(
        (r for r in dropped if r["ultraclean_reason"] == "score"),
        key=lambda r: (r["ultraclean_score"], r["id"]),
    )
    return {
        "kept, surest": [show(r) for r in by_score[:2]],
        "kept, barely": [show(r) for r in by_score[-2:]],
        "dropped, barely": [show(r) for r in low[-2:]],
        "dropped, surest": [show(r) for r in low[:2]],
    }

"""Compare the curated table with public CSVs and print every disagreement.

    python experiments/check_curated.py DATA

DATA is a folder with any of: `epoch_external_benchmark_{mmlu,bbh,gsm8k}.csv` and
`epoch_model_versions.csv` (epoch-research/benchmark-stitching, MIT), and
`obsscaling_base_llm_benchmark_eval.csv` (ryoungj/ObsScaling, Apache-2.0). A disagreement is not an
error: public tables hold several values for one model (other shots, other harnesses) and some
mistakes of their own; the point is that a reader sees all of them.
"""

from __future__ import annotations

import csv
import sys
from datetime import date
from pathlib import Path

from densing import curated_table
from densing.tables import Model, plain

TOLERANCE = 0.0005  # half of the last digit that reports print


def rows(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV, or none where it is not there."""
    if not file.exists():
        print(f"(not there: {file.name})")
        return []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def main(folder: Path) -> int:
    """Print the comparison; returns the number of disagreements."""
    models: dict[str, Model] = {}
    for model in curated_table().models:
        for name in (model.name, *model.aliases):
            models[plain(name)] = model
    compared = differing = 0
    for benchmark, column in (("MMLU", "EM"), ("BBH", "Average"), ("GSM8K", "EM")):
        for row in rows(folder / f"epoch_external_benchmark_{benchmark.lower()}.csv"):
            model = models.get(plain(row["Model version"] or ""))
            if model is None or benchmark not in model.scores:
                continue
            ours = model.scores[benchmark]
            theirs = float(row[column].rstrip("%")) / 100
            compared += 1
            if abs(ours.value - theirs) > TOLERANCE:
                differing += 1
                print(
                    f"{model.name:<28} {benchmark:<6} ours {ours.value:6.1%} ({ours.shots}-shot, "
                    f"{ours.source.split(',')[0][:40]})  public {theirs:6.1%} "
                    f"({row['Shots'] or '?'}-shot, {row['Source'][:40]})"
                )
    for row in rows(folder / "epoch_model_versions.csv"):
        model = models.get(plain(row["id"]))
        if model is None or not row["Version release date"] or model.released is None:
            continue
        compared += 1
        theirs_on = date.fromisoformat(row["Version release date"])
        if theirs_on != model.released:
            differing += 1
            print(f"{model.name:<28} date   ours {model.released}  public {theirs_on}")
    for row in rows(folder / "obsscaling_base_llm_benchmark_eval.csv"):
        model = models.get(plain(row["Model"]))
        if model is None:
            continue
        pairs = [
            ("parameters", model.parameters, row["Model Size (B)"], 1e9, 0.03),
            ("tokens", model.tokens, row["Pretraining Data Size (T)"], 1e12, 0.03),
        ]
        for name, ours_n, text, factor, tolerance in pairs:
            if ours_n is None or not text:
                continue
            compared += 1
            theirs_n = float(text) * factor
            if abs(theirs_n / ours_n - 1) > tolerance:
                differing += 1
                print(f"{model.name:<28} {name} ours {ours_n:.4g}  public {theirs_n:.4g}")
        if "MMLU" in model.scores:
            # Another harness: reported, but not counted as a disagreement below two points.
            compared += 1
            gap = float(row["MMLU"]) - model.scores["MMLU"].value
            if abs(gap) > 0.02:
                differing += 1
                print(
                    f"{model.name:<28} MMLU   report {model.scores['MMLU'].value:6.1%}  "
                    f"measured {float(row['MMLU']):6.1%} (ObsScaling)"
                )
    print(f"{compared} values compared, {differing} disagreements")
    return differing


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

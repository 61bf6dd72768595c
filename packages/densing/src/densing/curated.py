"""The table that ships: open base models with their figures, each with its source.

Three CSV files beside this one: `models.csv`, `scores.csv` (one figure a row) and `sources.csv`.
"""

from __future__ import annotations

import csv
from datetime import date
from importlib import resources

from densing.tables import Model, ModelTable, Score


def curated_table() -> ModelTable:
    """Open base models from LLaMA on, with sizes, dates, and scores whose sources are named.

    Figures are what the named report prints for the base (not the instructed) model. Not every
    model has every figure: what could not be sourced is not there.
    """
    sources = {row["id"]: f"{row['title']}, {row['address']}" for row in _rows("sources.csv")}
    scores: dict[str, dict[str, Score]] = {}
    for row in _rows("scores.csv"):
        scores.setdefault(row["model"], {})[row["benchmark"]] = Score(
            float(row["percent"]) / 100,
            int(row["shots"]) if row["shots"] else None,
            sources[row["source"]],
        )
    models = [
        Model(
            name=row["model"],
            family=row["family"],
            parameters=float(row["parameters_b"]) * 1e9,
            active_parameters=float(row["active_b"] or row["parameters_b"]) * 1e9,
            tokens=float(row["tokens_t"]) * 1e12 if row["tokens_t"] else None,
            released=date.fromisoformat(row["released"]),
            parent=row["parent"] or None,
            scores=scores.get(row["model"], {}),
            aliases=tuple(a for a in row["aliases"].split(" ") if a),
        )
        for row in _rows("models.csv")
    ]
    return ModelTable(tuple(models), "densing's curated table")


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("densing.data").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))

"""What is wrong with public tables: duplicates, misread sizes, scores at chance, future dates."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

from densing.benchmarks import match_benchmark
from densing.tables import Model, ModelTable, Problem, plain, size_in_name

# A trained language model has seen less than this, and more than it has parameters divided by this.
MOST_TOKENS = 1e14
SIZE_TOLERANCE = 1.35  # names round: Llama-1-7B has 6.7e9

# Errors of public tables that have been looked up: model, field, what the table says -> what is so.
KNOWN_ERRORS = {
    (
        "btlm3b8kbase",
        "tokens",
        6.27e14,
    ): "BTLM-3B saw 627 billion tokens (SlimPajama), not trillion",
    ("openllama7bv2", "parameters", 1.3e10): "OpenLLaMA 7B v2 has 7 billion parameters",
    ("qwen257ba14b", "parameters", 2.4e10): "Qwen2-57B-A14B has 57B in total and 14B active",
    ("mixtral8x22bv0.1", "parameters", 3.9e10): "Mixtral-8x22B has 141B in total; 39B are active",
    ("deepseekv2", "parameters", 2.1e10): "DeepSeek-V2 has 236B in total; 21B are active",
    ("deepseekcoderv2base", "parameters", 2.1e10): (
        "DeepSeek-Coder-V2 has 236B in total; 21B are active"
    ),
    ("jambav0.1", "parameters", 1.2e10): "Jamba has 52B in total; 12B are active",
}


def check_models(table: ModelTable, today: date) -> ModelTable:
    """The table with what is doubtful added to its problems; values stay unless a message says so.

    Args:
        table: as read. today: releases after it are problems.
    """
    problems = list(table.problems)
    problems += _duplicates(table.models)
    models = []
    for model in table.models:
        known = _known(model)
        problems += known
        if not known:
            problems += _suspicious(model)
        problems += _at_chance(model)
        if model.released and model.released > today:
            problems.append(
                Problem("date", model.name, f"is released on {model.released}, after {today}", True)
            )
            model = replace(model, released=None)
        if model.sparse and model.active_parameters is None:
            text = "a mixture of experts without its active parameters: only total can be used"
            problems.append(Problem("active", model.name, text))
        models.append(model)
    for field, what in (("parameters", "size"), ("released", "release date")):
        without = [m.name for m in models if m.scores and getattr(m, field) is None]
        if without:
            names = "all" if len(without) == len(models) else ", ".join(without)
            text = f"{len(without)} models have scores but no {what}: {names}"
            problems.append(Problem(field, "", text))
    return replace(table, models=tuple(models), problems=tuple(problems))


def _duplicates(models: tuple[Model, ...]) -> list[Problem]:
    seen: dict[str, list[Model]] = {}
    for model in models:
        seen.setdefault(plain(model.name), []).append(model)
    found = []
    for same in seen.values():
        if len(same) < 2:
            continue
        parts = []
        for benchmark in sorted({b for m in same for b in m.scores}):
            values = [m.scores[benchmark].value for m in same if benchmark in m.scores]
            if len(set(values)) > 1:
                parts.append(f"{benchmark} " + ", ".join(f"{v:.1%}" for v in values))
        what = "; ".join(parts) or "with equal scores"
        text = f"stands {len(same)} times: {what}; the first is used"
        found.append(Problem("duplicate", same[0].name, text))
    return found


def without_duplicates(table: ModelTable) -> ModelTable:
    """The first row of each model; `check_models` has named the others."""
    seen: dict[str, Model] = {}
    for model in table.models:
        seen.setdefault(plain(model.name), model)
    return replace(table, models=tuple(seen.values()))


def _known(model: Model) -> list[Problem]:
    found = []
    for (name, field, wrong), truth in KNOWN_ERRORS.items():
        value = getattr(model, field)
        if plain(model.name) == name and value and abs(value / wrong - 1) < 0.02:
            text = f"known error of public tables: {field} {value:.4g}; {truth}"
            found.append(Problem("known error", model.name, text))
    return found


def _suspicious(model: Model) -> list[Problem]:
    found = []
    named = size_in_name(model.name)
    if named and model.parameters:
        ratio = model.parameters / named
        if not 1 / SIZE_TOLERANCE < ratio < SIZE_TOLERANCE:
            text = f"has {model.parameters:.3g} parameters, but its name says {named:.3g}"
            found.append(Problem("suspicious", model.name, text))
    if model.active_parameters and model.parameters and model.active_parameters > model.parameters:
        text = f"active {model.active_parameters:.3g} exceed total {model.parameters:.3g}"
        found.append(Problem("suspicious", model.name, text))
    if model.tokens and model.tokens > MOST_TOKENS:
        text = f"{model.tokens:.3g} training tokens are more than anyone has: a wrong unit?"
        found.append(Problem("suspicious", model.name, text))
    if model.tokens and model.parameters and model.tokens < model.parameters:
        text = f"{model.tokens:.3g} training tokens are fewer than its parameters: a wrong unit?"
        found.append(Problem("suspicious", model.name, text))
    return found


def _at_chance(model: Model) -> list[Problem]:
    found = []
    for name, score in model.scores.items():
        benchmark = match_benchmark(name)
        if benchmark and score.value <= benchmark.chance:
            text = f"{name} {score.value:.1%} is at or below chance ({benchmark.chance:.0%})"
            found.append(Problem("chance", model.name, text + ": it has no density"))
    return found

"""Results of evaluation harnesses in: lm-evaluation-harness, and lighteval or the old leaderboard.

Both write one JSON file for a model, or several over time. The files say which model and which
score, not its size or its date: join a table that knows them (`ModelTable.joined`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from densing.benchmarks import Benchmark, match_benchmark
from densing.checks import check_models
from densing.tables import Model, ModelTable, Problem, Score, file_name

# The first that a task has is taken: what the benchmark's own paper reports.
METRICS = (
    "exact_match,strict-match", "exact_match,get-answer", "exact_match,none",
    "exact_match,flexible-extract", "math_verify,none", "pass@1,create_test", "pass_at_1,none",
    "pass@1,none", "pass@1", "acc_norm,none", "acc,none", "acc_norm", "acc", "qem", "em",
    "exact_match",
)  # fmt: skip
# MMLU is scored by plain accuracy; length normalisation is for completions of different lengths.
PLAIN_ACCURACY = ("MMLU", "MMLU-Pro", "GPQA")


def read_results(path: str | Path, *, today: date | None = None) -> ModelTable:
    """Read one results file, or every `*.json` below a folder.

    Args:
        path: of a file or folder.
        today: see `check_models`.

    Returns:
        one row for each model; a newer file's score of the same benchmark replaces an older one's,
        which is named in a problem.

    Raises:
        FileNotFoundError: neither a file nor a folder.
        ValueError: a file given by name is no results file, or a folder has none.
    """
    root = Path(path)
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(root.rglob("*.json"))
    else:
        raise FileNotFoundError(f"{path} does not exist: give a results file or a folder of them")
    models: dict[str, Model] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            found, doubts = read_one(file)
        except ValueError as error:
            if root.is_file():
                raise
            problems.append(Problem("file", file_name(file), str(error), True))
            continue
        problems += doubts
        old = models.get(found.name)
        if old is not None:
            for name, score in found.scores.items():
                if name in old.scores and old.scores[name].value != score.value:
                    text = (
                        f"{name} {old.scores[name].value:.1%} in {old.scores[name].source}, "
                        f"{score.value:.1%} in {score.source}: the latter is used"
                    )
                    problems.append(Problem("duplicate", found.name, text))
            old.scores.update(found.scores)
        else:
            models[found.name] = found
    if not models:
        raise ValueError(f"{path} holds no results file: expected JSON with a key 'results'")
    table = ModelTable(tuple(models.values()), file_name(path), tuple(problems))
    return check_models(table, today or date.today())


def read_one(file: Path) -> tuple[Model, list[Problem]]:
    """The model of one results file and what is doubtful about it.

    Raises:
        ValueError: not JSON, or not of a known layout; the message says what was looked for.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, Mapping):
        raise ValueError(f"{file} has no 'results': expected lm-eval's or lighteval's results file")
    general = content.get("config_general")
    if isinstance(general, Mapping) and any("|" in task for task in results):
        return _lighteval(file, results, general)
    return _lm_eval(file, results, content)


def _lm_eval(
    file: Path, results: Mapping[str, Any], content: Mapping[str, Any]
) -> tuple[Model, list[Problem]]:
    config = content.get("config") or {}
    name = content.get("model_name") or _model_argument(config.get("model_args"))
    if not name:
        raise ValueError(f"{file} does not name its model: expected 'model_name' or model_args")
    shots = content.get("n-shot") or {}
    children = {c for members in (content.get("group_subtasks") or {}).values() for c in members}
    model, problems = _empty(name, config.get("model_num_parameters")), []
    for task, values in results.items():
        benchmark = match_benchmark(task)
        if benchmark is None:
            if task not in children:
                problems.append(Problem("task", name, f"unknown task {task!r}", True))
            continue
        value = _metric(values, benchmark, name, task, problems)
        if value is not None:
            count = shots.get(task)
            if count is None:  # a group's shots are its members'
                members = (content.get("group_subtasks") or {}).get(task, [])
                count = next((shots[m] for m in members if m in shots), None)
            model.scores[benchmark.name] = Score(value, count, file_name(file))
    return model, problems


def _lighteval(
    file: Path, results: Mapping[str, Any], general: Mapping[str, Any]
) -> tuple[Model, list[Problem]]:
    name = general.get("model_name")
    if not name:
        raise ValueError(f"{file} does not name its model: expected config_general.model_name")
    model, problems = _empty(str(name), general.get("model_num_parameters")), []
    subjects: list[tuple[float, int | None]] = []
    for key, values in results.items():
        parts = key.split("|")
        if len(parts) < 3:  # "all" and other summaries
            continue
        task, count = parts[1], int(parts[2]) if parts[2].isdigit() else None
        if task.lower().startswith(("hendryckstest-", "mmlu:")):
            mmlu = match_benchmark("MMLU")
            assert mmlu is not None
            value = _metric(values, mmlu, model.name, task, problems)
            if value is not None:
                subjects.append((value, count))
            continue
        benchmark = match_benchmark(task)
        if benchmark is None:
            problems.append(Problem("task", model.name, f"unknown task {key!r}", True))
            continue
        value = _metric(values, benchmark, model.name, key, problems)
        if value is not None:
            model.scores[benchmark.name] = Score(value, count, file_name(file))
    if subjects:
        # The leaderboard's MMLU is the plain mean over the 57 subjects.
        mean = sum(v for v, _ in subjects) / len(subjects)
        model.scores["MMLU"] = Score(mean, subjects[0][1], file_name(file))
        if len(subjects) != 57:
            text = f"MMLU is the mean of {len(subjects)} subjects, not of 57"
            problems.append(Problem("partial", model.name, text))
    return model, problems


def _empty(name: str, parameters: Any) -> Model:
    size = float(parameters) if isinstance(parameters, int | float) and parameters > 0 else None
    return Model(name=name, parameters=size, aliases=(name.split("/")[-1],))


def _model_argument(arguments: Any) -> str | None:
    """The model in lm-eval's `model_args`: a string `pretrained=x,dtype=y`, or a mapping."""
    if isinstance(arguments, Mapping):
        return arguments.get("pretrained") or arguments.get("model")
    if isinstance(arguments, str):
        for part in arguments.split(","):
            key, _, value = part.partition("=")
            if key.strip() in ("pretrained", "model", "path"):
                return value.strip() or None
    return None


def _metric(
    values: Mapping[str, Any],
    benchmark: Benchmark,
    model: str,
    task: str,
    problems: list[Problem],
) -> float | None:
    order = METRICS
    if benchmark.name in PLAIN_ACCURACY:
        order = ("acc,none", "acc", *METRICS)
    numbers = {
        k: float(v)
        for k, v in values.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and "stderr" not in k
    }
    metric = next((m for m in order if m in numbers), None)
    if metric is None:
        text = f"{task} has none of the known metrics: it has {', '.join(numbers) or 'no number'}"
        problems.append(Problem("metric", model, text, True))
        return None
    value = numbers[metric]
    if not math.isfinite(value) or not 0 <= value <= 100:
        problems.append(Problem("value", model, f"{task} {metric} is {value:g}", True))
        return None
    if value > 1:
        text = f"{task} {metric} {value:g} is read as percent: harnesses write fractions"
        problems.append(Problem("scale", model, text))
        return value / 100
    return value

"""CSV in: a column map, sizes in any unit, percent or fraction found out and shown."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from densing.benchmarks import match_benchmark
from densing.checks import check_models
from densing.tables import Model, ModelTable, Problem, Score, file_name

FIELDS = ("name", "family", "parameters", "active_parameters", "tokens", "released", "parent")
# Headers that say what they hold; (B), (T) and the like multiply.
_GUESSES = {
    "name": r"^(model|name|model name|model version)$",
    "family": r"^(model )?family$",
    "parameters": r"^((total )?param(eter)?s?|model size|size|n)( \(\w+\))?$",
    "active_parameters": r"^active param(eter)?s?( \(\w+\))?$",
    "tokens": r"^((pre)?training )?(tokens|data size|dataset size)( \(\w+\))?$",
    "released": r"^(released?|release date|date|version release date|publication date)$",
    "parent": r"^(parent|base model)$",
}
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Column:
    """Where a field is read from: a header and a factor."""

    header: str
    factor: float = 1.0


def parse_column(text: str) -> Column:
    """`Model Size (B)` or `Model Size * 1e9`; a unit in brackets multiplies by itself.

    Raises:
        ValueError: a factor that is no number.
    """
    header, star, factor = text.rpartition("*")
    if star:
        try:
            return Column(header.strip(), float(factor))
        except ValueError:
            raise ValueError(
                f"column {text!r}: expected HEADER or HEADER * FACTOR, such as 'Size (B) * 1e9'"
            ) from None
    unit = re.search(r"\(([kmbt])\w*\)\s*$", text, re.I)
    return Column(text.strip(), _UNITS[unit[1].lower()] if unit else 1.0)


def read_csv(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    today: date | None = None,
    shots: Mapping[str, int] | None = None,
) -> ModelTable:
    """Read a table of models.

    Args:
        path: a CSV with a header.
        columns: field or benchmark -> header, or `header * factor`. Fields: name, family,
            parameters, active_parameters, tokens, released, parent. What is not given is guessed
            from the header: `Model Size (B)` are parameters in billions, `MMLU` is MMLU.
        today: dates after it are problems; the real today by default.
        shots: benchmark -> shots, where the file does not say.

    Returns:
        the table, with its problems.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a CSV, a mapped header that is missing, or no column of names; the message
            lists the headers there are.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a CSV file")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            headers = [h.strip() for h in reader.fieldnames or [] if h is not None]
            reader.fieldnames = headers
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows: expected a header and one row for each model")
    found = _columns(headers, columns or {}, path)
    scored = {k: v for k, v in found.items() if k not in FIELDS}
    problems: list[Problem] = []
    if not scored:
        problems.append(Problem("columns", "", f"no column of scores among {', '.join(headers)}"))
    raw: dict[str, list[tuple[int, float, bool]]] = {}
    models: list[Model] = []
    for number, row in enumerate(rows, start=2):  # the header is line 1
        name = (row.get(found["name"].header) or "").strip()
        if not name:
            problems.append(Problem("name", f"line {number}", "has no model name", True))
            continue
        model = _model(name, row, found, number, problems)
        for benchmark, column in scored.items():
            value, percent_sign = _number(row.get(column.header), name, column.header, problems)
            if value is not None:
                raw.setdefault(benchmark, []).append((len(models), value, percent_sign))
        models.append(model)
    scales = {}
    for benchmark, values in raw.items():
        scales[benchmark] = _apply_scale(benchmark, values, models, problems, shots or {}, file)
    table = ModelTable(tuple(models), file_name(path), tuple(problems), scales)
    return check_models(table, today or date.today())


def _columns(headers: list[str], given: Mapping[str, str], path: str | Path) -> dict[str, Column]:
    found = {}
    for key, text in given.items():
        column = parse_column(text)
        if column.header not in headers:
            raise ValueError(
                f"{path} has no column {column.header!r} (for {key}): it has {', '.join(headers)}"
            )
        benchmark = None if key in FIELDS else match_benchmark(key)
        found[benchmark.name if benchmark else key] = column
    for field, pattern in _GUESSES.items():
        if field not in found:
            header = next((h for h in headers if re.match(pattern, h, re.I)), None)
            if header:
                found[field] = parse_column(header)
    taken = {column.header for column in found.values()}
    for header in headers:
        benchmark = match_benchmark(header)
        if benchmark and header not in taken and benchmark.name not in found:
            found[benchmark.name] = Column(header)
    if "name" not in found:
        raise ValueError(
            f"{path} has no column of model names: it has {', '.join(headers)}; "
            "name one, as in columns={'name': 'HEADER'}"
        )
    return found


def _model(
    name: str,
    row: Mapping[str, str],
    found: Mapping[str, Column],
    number: int,
    problems: list[Problem],
) -> Model:
    def text(field: str) -> str:
        return (row.get(found[field].header) or "").strip() if field in found else ""

    sizes = {}
    for field in ("parameters", "active_parameters", "tokens"):
        sizes[field] = None
        if text(field):
            value, _ = _number(text(field), name, found[field].header, problems)
            if value is not None and value > 0:
                sizes[field] = value * found[field].factor
            elif value is not None:
                problems.append(Problem("value", name, f"{found[field].header} is {value:g}", True))
    released = None
    if text("released"):
        try:
            released = date.fromisoformat(text("released")[:10])
        except ValueError:
            message = f"{found['released'].header} is {text('released')!r}, not YYYY-MM-DD"
            problems.append(Problem("date", name, message, True))
    return Model(
        name=name,
        family=text("family"),
        released=released,
        parent=text("parent") or None,
        scores={},
        **sizes,
    )


def _number(
    text: str | None, model: str, header: str, problems: list[Problem]
) -> tuple[float | None, bool]:
    """A cell's number and whether it had a percent sign; an unreadable one becomes a problem."""
    cell = (text or "").strip().replace(",", "")
    if cell.lower() in ("", "-", "–", "na", "n/a", "nan", "none", "null"):
        return None, False
    try:
        value = float(cell.rstrip("%").strip())
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problems.append(Problem("value", model, f"{header} is {text!r}, not a number", True))
        return None, False
    return value, cell.endswith("%")


def _apply_scale(
    benchmark: str,
    values: list[tuple[int, float, bool]],
    models: list[Model],
    problems: list[Problem],
    shots: Mapping[str, int],
    file: Path,
) -> str:
    """Find out percent or fraction, and give the models their scores, but for doubtful ones."""
    signs = sum(1 for _, _, sign in values if sign)
    large = sum(1 for _, v, sign in values if v > 1 and not sign)
    small = len(values) - signs - large
    percent = large > small  # of those without a sign
    if signs and not large and not small:
        scale = "percent"
    elif not signs and (large == 0 or small == 0):
        scale = "percent" if large else "fraction"
    else:
        scale = "mixed"
        problems.append(
            Problem(
                "scale",
                "",
                f"{benchmark} mixes scales: {signs} values with %, {large} above 1, {small} from 0 "
                f"to 1; read as {'percent' if percent else 'fraction'} where there is no sign",
            )
        )
    for at, value, sign in values:
        name = models[at].name
        if not sign and scale == "mixed" and (value > 1) != percent:
            message = f"{benchmark} {value:g} is on another scale than most of its column"
            problems.append(Problem("scale", name, message, True))
            continue
        fraction = value / 100 if sign or (percent and not sign) or scale == "percent" else value
        if not 0 <= fraction <= 1:
            message = f"{benchmark} {value:g} is no score"
            problems.append(Problem("value", name, message, True))
            continue
        score = Score(fraction, shots.get(benchmark), file_name(file))
        models[at].scores[benchmark] = score
    return scale

"""What a command reads: the shipped table, a CSV, or results files, by what the path is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np

from densing.csv_files import read_csv
from densing.curated import curated_table
from densing.reference import AnyReference
from densing.reference_models import reference_from_dict
from densing.results_files import read_results
from densing.tables import ModelTable


def load_table(
    path: Path | None,
    columns: Iterable[str] = (),
    *,
    join: bool = True,
    today: date | None = None,
) -> ModelTable:
    """The curated table (no path), a CSV, or lm-eval and lighteval results (JSON or a folder).

    Args:
        path: of the file or folder.
        columns: `FIELD=HEADER` or `FIELD=HEADER * FACTOR`, for a CSV.
        join: fill sizes, dates and families that are missing from the curated table.
        today: see `checks.check_models`.

    Raises:
        ValueError: a column map that is none, or what the readers raise.
    """
    if path is None:
        return curated_table()
    mapping = {}
    for text in columns:
        field, equals, header = text.partition("=")
        if not equals:
            raise ValueError(f"--column {text!r}: expected FIELD=HEADER, such as 'MMLU=EM'")
        mapping[field.strip()] = header.strip()
    if path.suffix.lower() in (".csv", ".tsv") or (mapping and path.is_file()):
        table = read_csv(path, mapping, today=today)
    else:
        table = read_results(path, today=today)
    return table.joined(curated_table()) if join else table


def load_columns(path: Path, names: Iterable[str], columns: Iterable[str] = ()) -> dict:
    """Columns of numbers from a CSV, such as a ladder's parameters, tokens and losses.

    Args:
        path: of the CSV. names: columns wanted.
        columns: `NAME=HEADER` or `NAME=HEADER * FACTOR` where the header differs.

    Raises:
        FileNotFoundError, ValueError: no file, no such column, or a cell that is no number.
    """
    import csv

    from densing.csv_files import parse_column

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a CSV file")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        headers = [h.strip() for h in reader.fieldnames or []]
        reader.fieldnames = headers
        rows = list(reader)
    given = dict(text.partition("=")[::2] for text in columns)
    found = {}
    for name in names:
        column = parse_column(given.get(name, name))
        if column.header not in headers:
            raise ValueError(
                f"{path} has no column {column.header!r}: it has {', '.join(headers)}; "
                f"name it, as in --column '{name}=HEADER'"
            )
        values = []
        for number, row in enumerate(rows, start=2):
            try:
                values.append(float(row[column.header]) * column.factor)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{path}:{number}: {column.header} is {row[column.header]!r}, not a number"
                ) from None
        found[name] = np.array(values)
    return found


def load_reference(path: Path) -> AnyReference:
    """A reference that `densing fit --scores` wrote.

    Raises:
        FileNotFoundError, ValueError: no file, or not a reference.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make one with densing fit --scores")
    try:
        return reference_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None

"""Options that several commands of `densing` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Table = Annotated[
    Path | None,
    typer.Argument(
        help="CSV, results JSON, or a folder of results.", show_default="the table that ships"
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="FIELD=HEADER or 'FIELD=HEADER * 1e9' of a CSV; repeatable."),
]
Join = Annotated[
    bool, typer.Option(help="Fill missing sizes, dates and families from the table that ships.")
]
Basis = Annotated[
    str,
    typer.Option(
        "--parameters", help="Count 'total' or 'active' parameters. Yours to choose: no default."
    ),
]
BenchmarkName = Annotated[str, typer.Option("--benchmark", help="Which scores to use.")]
Anchor = Annotated[str, typer.Option(help="Family whose members have density around 1.")]
Estimator = Annotated[
    str,
    typer.Option(
        help="envelope, envelope_by_day, stepped, quantile_95, quantile_90 or least_squares."
    ),
]
Margin = Annotated[
    float, typer.Option(help="Leave out scores within this share of the range above chance.")
]
MinParameters = Annotated[float, typer.Option(help="Leave out smaller models, e.g. 1e9.")]
Since = Annotated[str, typer.Option(help="Leave out earlier releases, YYYY-MM-DD.")]
Until = Annotated[str, typer.Option(help="Leave out later releases, YYYY-MM-DD.")]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples of each interval.")]
Unit = Annotated[str, typer.Option(help="What the bootstrap draws: models or families.")]
Seed = Annotated[int, typer.Option(help="Of the resampling.")]
Json = Annotated[bool, typer.Option("--json", help="End with the result as one line of JSON.")]

"""The `densing` command."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _cli
from ._cli_data import check_data, fit, loss
from ._cli_options import (
    Anchor,
    Basis,
    BenchmarkName,
    Columns,
    Estimator,
    Join,
    Json,
    Margin,
    MinParameters,
    Resamples,
    Seed,
    Since,
    Table,
    Unit,
    Until,
)

if TYPE_CHECKING:
    from densing.sensitivity import Headline
    from densing.table_density import Choices
    from densing.tables import ModelTable

app = typer.Typer(
    help="Capacity density: how many parameters a reference would need to be as good. Every "
    "command works on the table that ships (open base models, sourced figures) or on yours: CSV or "
    "results of lm-evaluation-harness and lighteval. Headlines come with an interval and with what "
    "other choices would have given. Start with: densing trend --parameters total",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OTHER_ANCHORS = ("LLaMA", "Llama", "Llama 2", "Llama-2", "Qwen1.5", "Qwen2.5")


def _day(text: str, option: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected YYYY-MM-DD") from None


def _choices(
    basis: str, benchmark: str, anchor: str, margin: float, least: float, since: str, until: str
) -> Choices:
    from densing.table_density import Choices

    return Choices(
        basis=basis,  # type: ignore[arg-type]
        benchmark=benchmark,
        anchor=anchor,
        margin=margin,
        min_parameters=least,
        since=_day(since, "--since"),
        until=_day(until, "--until"),
    )


def _headline(table: ModelTable, choices: Choices, estimator: str, resamples: int, seed: int,
              unit: str = "models") -> Headline:  # fmt: skip
    from densing.sensitivity import headline
    from densing.tables import plain

    there = {plain(m.family) for m in table.models}
    others = [a for a in OTHER_ANCHORS if plain(a) in there and plain(a) != plain(choices.anchor)]
    distinct = list({plain(a): a for a in others}.values())
    return headline(
        table, choices, estimator, anchors=distinct, resamples=resamples, seed=seed, unit=unit
    )


def _problems(table: ModelTable) -> None:
    if table.problems:
        typer.echo(
            f"doubts about the data: {len(table.problems)}; densing check-data prints them",
            err=True,
        )


app.command()(fit)


@app.command()
def density(
    parameters: Basis,
    table: Table = None,
    score: Annotated[
        float | None, typer.Option(help="One score (a fraction), instead of a table.")
    ] = None,
    size: Annotated[float | None, typer.Option(help="That model's parameters, e.g. 2.4e9.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Reference JSON.", show_default="the anchor family")
    ] = None,
    benchmark: BenchmarkName = "MMLU",
    anchor: Anchor = "LLaMA",
    margin: Margin = 0.05,
    column: Columns = None,
    join: Join = True,
    as_json: Json = False,
) -> None:
    """Density of one model (--score and --size) or of every model of a table, with intervals."""
    from densing import commands
    from densing.sources import load_table

    loaded = load_table(table, column or [], join=join)
    choices = _choices(parameters, benchmark, anchor, margin, 0.0, "1900-01-01", "9999-12-31")
    result = commands.density(loaded, choices, score, size, reference)
    print(result.text)
    _problems(loaded)
    if as_json:
        print(json.dumps(result.values))


@app.command()
def trend(
    parameters: Basis,
    table: Table = None,
    benchmark: BenchmarkName = "MMLU",
    anchor: Anchor = "LLaMA",
    estimator: Estimator = "envelope",
    margin: Margin = 0.05,
    min_parameters: MinParameters = 0.0,
    since: Since = "2023-02-24",
    until: Until = "9999-12-31",
    break_on: Annotated[
        str | None, typer.Option(help="Compare growth before and after this date.")
    ] = None,
    resamples: Resamples = 1000,
    unit: Unit = "models",
    seed: Seed = 0,
    column: Columns = None,
    join: Join = True,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Doubling time of the best density, its interval, and what other choices give.

    The sensitivity table is always printed: one number alone would be misleading.
    """
    from densing import commands
    from densing._files import write_json
    from densing.sensitivity import table_text
    from densing.sources import load_table

    loaded = load_table(table, column or [], join=join)
    choices = _choices(parameters, benchmark, anchor, margin, min_parameters, since, until)
    found = _headline(loaded, choices, estimator, resamples, seed, unit)
    print(table_text(found))
    values: dict[str, Any] = found.to_dict()
    if break_on:
        text, values["break"] = commands.break_on(
            loaded, choices, estimator, _day(break_on, "--break-on"), resamples, seed
        )
        print(text)
    print(f"left out: {commands.reasons(found.densities.left_out)}")
    _problems(loaded)
    if out:
        write_json(out, values)
        print(f"written to {out}")
    if as_json:
        print(json.dumps(values))


@app.command()
def forecast(
    parameters: Basis,
    score: Annotated[float, typer.Option(help="The score to reach, a fraction.")],
    by: Annotated[str, typer.Option(help="By when, YYYY-MM-DD.")],
    table: Table = None,
    benchmark: BenchmarkName = "MMLU",
    anchor: Anchor = "LLaMA",
    margin: Margin = 0.05,
    min_parameters: MinParameters = 0.0,
    since: Since = "2023-02-24",
    until: Until = "9999-12-31",
    resamples: Resamples = 1000,
    seed: Seed = 0,
    column: Columns = None,
    join: Join = True,
    as_json: Json = False,
) -> None:
    """Parameters that the densest model needs for a score by a date, by every estimator."""
    from densing import commands
    from densing.sources import load_table

    loaded = load_table(table, column or [], join=join)
    choices = _choices(parameters, benchmark, anchor, margin, min_parameters, since, until)
    result = commands.forecast(loaded, choices, score, _day(by, "--by"), resamples, seed)
    print(result.text)
    _problems(loaded)
    if as_json:
        print(json.dumps(result.values))


@app.command()
def report(
    parameters: Basis,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")],
    table: Table = None,
    benchmark: BenchmarkName = "MMLU",
    anchor: Anchor = "LLaMA",
    estimator: Estimator = "envelope",
    margin: Margin = 0.05,
    min_parameters: MinParameters = 0.0,
    since: Since = "2023-02-24",
    until: Until = "9999-12-31",
    runs: Annotated[
        Path | None, typer.Option(help="Ladder's CSV of parameters, tokens, loss.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Ladder's CSV of loss and score, with --runs.")
    ] = None,
    chance: Annotated[float | None, typer.Option(help="Score of guessing, for --scores.")] = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    column: Columns = None,
    join: Join = True,
) -> None:
    """One self-contained HTML page: density over time, sensitivity, compression, data doubts.

    With --runs and --scores also the ladder's two laws, with held-out points.
    """
    import shlex
    import sys

    from densing import commands
    from densing._files import write_text
    from densing.sources import load_table

    loaded = load_table(table, column or [], join=join)
    choices = _choices(parameters, benchmark, anchor, margin, min_parameters, since, until)
    found = _headline(loaded, choices, estimator, resamples, seed)
    command = "densing " + shlex.join(sys.argv[1:])
    write_text(out, commands.report(loaded, found, runs, scores, chance, seed, command))
    print(f"{out}: {found.trend.doubling_days:.0f} days, and what other choices give")


app.command("check-data")(check_data)
app.command()(loss)


def main() -> None:
    """Entry point of the console script."""
    _cli.run(app)

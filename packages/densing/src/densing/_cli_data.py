"""The commands about data of one's own: fit runs, check a table, measure a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ._cli_options import Columns, Join, Json, Resamples, Seed, Table


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def fit(
    runs: Annotated[Path, typer.Argument(help="CSV of runs: parameters, tokens, loss.")],
    scores: Annotated[
        Path | None,
        typer.Option(help="CSV of loss and score: fits the score law too, and makes a reference."),
    ] = None,
    column: Columns = None,
    irreducible: Annotated[
        bool, typer.Option(help="Whether the loss law has a constant term; the paper's has none.")
    ] = True,
    tokens: Annotated[float, typer.Option(help="D0 of the reference.")] = 1e12,
    chance: Annotated[
        float | None, typer.Option(help="Score of guessing.", show_default="fitted")
    ] = None,
    hold_out_above: Annotated[
        float | None, typer.Option(help="Predict the runs with more parameters than this.")
    ] = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a loss law to training runs, with intervals, flags and held-out errors.

    With --scores it also fits the score law and writes a reference for density, trend and forecast.
    """
    from densing import fit_command
    from densing._files import write_json

    result = fit_command.fit(
        runs, scores, column or [], irreducible, tokens, chance, hold_out_above, resamples, seed
    )
    print(result.text)
    if out:
        write_json(out, result.values)
        print(f"written to {out}")
    if as_json:
        print(json.dumps(result.values))


def check_data(
    table: Table = None,
    column: Columns = None,
    join: Join = False,
    as_json: Json = False,
) -> None:
    """Name everything doubtful about a table: scales, duplicates, chance, dates, known errors.

    Exit code 1 where a value or a model had to be left out.
    """
    from densing.sources import load_table
    from densing.tables import show

    loaded = load_table(table, column or [], join=join)
    print(f"{loaded.source}: {len(loaded.models)} models")
    for name, models in loaded.benchmarks().items():
        print(f"  {name}: {models} scores, {loaded.scales.get(name, 'fraction')}")
    print(show(loaded.problems) or "nothing doubtful found")
    if as_json:
        print(
            json.dumps(
                {
                    "source": loaded.source,
                    "models": len(loaded.models),
                    "scales": loaded.scales,
                    "problems": [
                        {"kind": p.kind, "model": p.model, "message": p.message,
                         "excluded": p.excluded}
                        for p in loaded.problems
                    ],
                }
            )
        )  # fmt: skip
    if any(p.excluded for p in loaded.problems):
        raise typer.Exit(1)


def loss(
    model: Annotated[Path, typer.Argument(help="transformers folder of a causal model.")],
    pairs: Annotated[Path, typer.Argument(help="JSON lines of prompt and answer.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Loss of each pair; resumes from it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in one forward pass.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer.", show_default="the context")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    register: Annotated[
        str | None,
        typer.Option(
            help="Python module whose register() tells transformers of the model's architecture, "
            "such as minicpm4."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Conditional loss of a model: nats per token and per byte of the answers alone."""
    from densing import commands

    with _progress("measuring") as progress:
        found = commands.loss(
            model, pairs, out, batch_size, max_length, dtype, device, register, progress
        )
    print(f"{found.per_byte:.4f} nats per byte, {found.per_token:.4f} nats per token")
    print(
        f"{found.items} answers, {found.tokens} tokens, {found.nats:.2f} nats in all; "
        f"{found.truncated} prompts cut, {found.straddled} boundaries inside a token, "
        f"{len(found.excluded)} left out"
    )
    for identity, reason in found.excluded.items():
        print(f"  left out {identity}: {reason}")
    if as_json:
        print(json.dumps(found.to_dict()))

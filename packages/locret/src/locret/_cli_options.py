"""Options that several `locret` commands share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from locret.config import LocretConfig

Model = Annotated[Path, typer.Argument(help="Folder of a transformers decoder.")]
Data = Annotated[
    list[Path],
    typer.Option(
        help="A .txt or .jsonl file (lines with text, or prompt and answer), or a folder of them; "
        "repeat it."
    ),
]
Heads = Annotated[
    Path | None, typer.Option(help="Folder that `locret train` wrote.", show_default="none")
]
Scorer = Annotated[
    str,
    typer.Option(
        help="Without --heads: snapkv, h2o, streaming, keynorm, keydiff, expected or random."
    ),
]
KeyDiff = Annotated[
    float,
    typer.Option(
        help="With --heads: how much a key's being unlike the others counts beside what the heads "
        "say. 0: the heads alone, as in the paper."
    ),
]
Budget = Annotated[int, typer.Option(help="Entries each head keeps between chunks, b.")]
Chunk = Annotated[int, typer.Option(help="Tokens read at once, B.")]
Stabilisers = Annotated[
    int | None,
    typer.Option(help="Newest entries that stay whatever their score.", show_default="BUDGET/4"),
]
Sinks = Annotated[int, typer.Option(help="First tokens that always stay.")]
Local = Annotated[int, typer.Option(help="Last tokens, read after the last eviction.")]
Positions = Annotated[str, typer.Option(help='Of what is kept: "contiguous" or "original".')]
Storage = Annotated[
    str, typer.Option(help='Of keys and values: "model" (its dtype), "int8" or "int4".')
]
Budgets = Annotated[
    str, typer.Option(help='Alike for all ("uniform"), or shared by need: "layer" or "head".')
]
Merge = Annotated[
    float | None,
    typer.Option(help="Evicted values join kept keys of this cosine or more.", show_default="no"),
]
Length = Annotated[int, typer.Option(help="Tokens of a window.")]
Answer = Annotated[int, typer.Option(help="Tokens at a window's end whose queries count.")]
Dtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")]


def chosen(heads: Path | None, scorer: str, keydiff: float = 0.0) -> Any:
    """Trained heads, or a scorer by name, checked before the model is read."""
    from locret.heads import RetainingHeads
    from locret.heads_and_keydiff import HeadsAndKeyDiff
    from locret.scorers import SCORERS

    if not 0 <= keydiff < float("inf"):
        raise ValueError(f"--keydiff must be 0 or more, got {keydiff}")
    if heads is not None:
        found = RetainingHeads.load(heads)
        return HeadsAndKeyDiff(found, keydiff) if keydiff else found
    if keydiff:
        raise ValueError("--keydiff needs --heads; KeyDiff alone is --scorer keydiff")
    if scorer not in SCORERS:
        raise ValueError(f"--scorer must be one of {', '.join(SCORERS)}, got {scorer!r}")
    return scorer


def sized(
    budget: int, chunk: int, stabilisers: int | None, sinks: int, local: int, **more: Any,
) -> LocretConfig:  # fmt: skip
    """The configuration that the options ask for."""
    from locret.config import LocretConfig

    return LocretConfig(
        budget=budget, chunk=chunk, stabilisers=budget // 4 if stabilisers is None else stabilisers,
        sinks=sinks, local=local, **more,
    )  # fmt: skip


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error; yields what moves it: a line and the share done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def move(text: str, done: float) -> None:
            bar.update(task, description=text, completed=done)

        yield move


@contextmanager
def reading(ids: Tensor) -> Iterator[Callable[[float], None]]:
    """A bar for a text `[B, T]` that is read; yields what is told the share."""
    with progress_bar() as move:
        text = f"reading {ids.shape[1]:,} tokens"
        move(text, 0.0)
        yield lambda share: move(text, share)

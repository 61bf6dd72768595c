"""Options that several commands share, and how they are read and shown."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cpmcu.engine import Engine

Model = Annotated[str, typer.Argument(help="Model folder or .gguf file.", show_default=False)]
DType = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16, on a GPU also float16 (auto: bf16 on a GPU and where the "
        "CPU's kernels are no slower in it)."
    ),
]
Quant = Annotated[
    str,
    typer.Option(
        help="Weights in memory: float32, bfloat16, int8, int4, ternary (auto: as the file has "
        "them, or as --dtype)."
    ),
]
Sparse = Annotated[
    str,
    typer.Option(
        help="InfLLM v2 attention: on, off, or auto: as the model's config.json says. It begins "
        "where a budget of 96 blocks of 64 keys, or the model's own, is exceeded."
    ),
]
KV = Annotated[
    str,
    typer.Option(
        "--kv", help="Keys and values in memory: int8 (half of bfloat16's), or auto: as --dtype."
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="gpu (PyTorch and Triton), cpu (C++), reference (PyTorch), or auto: the first that "
        "can run."
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads; default: one for each core.")]
ContextLimit = Annotated[
    int | None, typer.Option(help="Tokens to make room for; default: the model's limit.")
]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[
    float, typer.Option(help="Keep the likeliest tokens that together reach this mass.")
]
TopK = Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0: all.")]
Penalty = Annotated[float, typer.Option(help="Above 1: make tokens already seen less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
RepeatableStop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be repeated.")
]
MinP = Annotated[
    float, typer.Option(help="Keep tokens at least this fraction as likely as the best.")
]
Limit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit", help="Bytes for weights, cache and activations: 800M, 4GiB, ..."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output instead.")
]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str, option: str) -> float:
    """Bytes of "800M", "4GiB", "35e9"; ValueError names `option`."""
    match = re.fullmatch(
        r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(i?)B?(?:/s)?\s*", text, re.IGNORECASE
    )
    try:
        assert match is not None
        number, unit = float(match[1]), match[2].upper()
        value = number * (_BINARY[unit] if match[3] else _UNITS[unit])
    except (AssertionError, ValueError, KeyError):
        raise ValueError(
            f"{option} must be a number of bytes such as 800M or 4GiB, got '{text}'"
        ) from None
    if not 0 < value < 1e18:
        raise ValueError(f"{option} must be positive and below 1e18, got '{text}'")
    return value


def memory_limit_bytes(text: str | None) -> int | None:
    """Whole bytes of --memory-limit, or None."""
    return None if text is None else int(parse_bytes(text, "--memory-limit"))


def size(count: int) -> str:
    """Bytes for people: "269.0 MB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


@contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load(
    model: str,
    dtype: str,
    quant: str,
    sparse: str,
    kv: str,
    backend: str,
    threads: int | None,
    max_context: int | None,
    memory_limit: str | None,
) -> Engine:
    """The engine for a command's options, with a progress bar."""
    from cpmcu.engine import Engine

    with working("loading") as progress:
        return Engine.from_pretrained(
            model,
            dtype=dtype,
            quant=quant,
            sparse=sparse,
            kv=kv,
            backend=backend,
            threads=threads,
            max_context=max_context,
            memory_limit=memory_limit_bytes(memory_limit),
            progress=progress,
        )


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output, its title above it."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    print(title)
    # A pipe has no width: do not let Rich cut rows to its guess of 80 columns.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def read_prompt(
    prompt: str | None, prompt_file: Path | None, messages: Path | None
) -> dict[str, Any]:
    """The one of Engine.generate's prompt arguments that the options give."""
    given = [value for value in (prompt, prompt_file, messages) if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of --prompt, --prompt-file, --messages; got {len(given)}")
    if prompt is not None:
        return {"prompt": prompt}
    file = prompt_file or messages
    assert file is not None
    try:
        text = file.read_text(encoding="utf-8")
        if prompt_file is not None:
            return {"prompt": text}
        listed = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(listed, list):
        raise ValueError(f"{file}: expected a JSON list of messages, got {type(listed).__name__}")
    return {"messages": listed}

"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Inputs = Annotated[
    list[Path],
    typer.Argument(help="All .jsonl(.gz, .zst), all .parquet, or all .warc(.gz) and .wet.gz."),
]
JsonLines = Annotated[list[Path], typer.Argument(help="JSON lines (.jsonl, .jsonl.gz, .jsonl.zst)")]
Folder = Annotated[Path, typer.Argument(help="Classifier folder, as `ultraclean train` writes it.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Negatives = Annotated[list[Path], typer.Option(help="JSON lines of bad text; repeatable.")]
TextKey = Annotated[str, typer.Option(help="Column that holds the text.")]
SourceKey = Annotated[str, typer.Option(help="Column that says where a text is from.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]
Normaliser = Annotated[
    str, typer.Option(help="ultrafine, ultrafine-words, whitespace, dclm or zh-char.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="tokenizer.json for the normaliser `ultrafine`.")
]
Workers = Annotated[int, typer.Option(help="Threads; the outputs do not depend on them.")]
Compress = Annotated[str, typer.Option(help="gz or zst: of outputs that are JSON lines.")]
MinChars = Annotated[int, typer.Option(help="Reject shorter texts.")]
DropDuplicates = Annotated[bool, typer.Option(help="Reject texts seen before.")]
By = Annotated[str, typer.Option(help="What --keep counts: characters, tokens or texts.")]
Named = Annotated[
    list[str], typer.Option(help="NAME=FILE.jsonl; repeatable, and a name may have several files.")
]


def named_files(values: list[str], option: str) -> dict[str, list[Path]]:
    """NAME=FILE, grouped by name.

    Raises:
        ValueError: a value without a name.
    """
    found: dict[str, list[Path]] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise ValueError(f"{option} {value!r}: expected NAME=FILE.jsonl")
        found.setdefault(name, []).append(Path(file))
    return found

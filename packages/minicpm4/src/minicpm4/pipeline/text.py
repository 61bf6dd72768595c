"""Text for a pipeline: the testbed's corpora by name, or JSONL files by path."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minicpm4._files import sha256
from minicpm4.pipeline.stage import needs


@dataclass(frozen=True)
class Passage:
    """A piece of a document that the pipeline handles as one: `id` names the document and place."""

    id: str
    text: str
    source: str


def check_source(name: str) -> None:
    """Raise ValueError or FileNotFoundError for a source that is neither a corpus nor a file."""
    if not is_file(name):
        with needs("testbed", "corpus " + name):
            import testbed
        if name not in testbed.corpora():
            raise ValueError(
                f"unknown corpus {name!r}: expected one of {', '.join(testbed.corpora())}, "
                "or the path of a .jsonl file"
            )
    elif not Path(name).expanduser().is_file():
        raise FileNotFoundError(f"corpus file {name} does not exist")


def is_file(name: str) -> bool:
    """Whether a source's name is a path."""
    return "/" in name or name.endswith(".jsonl")


def source_identity(name: str) -> str:
    """What changes when the text of a source does: a file's hash, or the testbed's version."""
    if is_file(name):
        return sha256(Path(name).expanduser())
    return "testbed " + importlib.metadata.version("minicpm4-testbed")


def passages(name: str, longest: int) -> Iterator[Passage]:
    """The documents of a source, cut at paragraphs into passages of at most `longest` characters.

    A web document is a page, these corpora hold books and encyclopaedia articles: without the cut,
    a classifier could tell the sources apart by their length alone.

    Raises:
        ValueError: a line of a JSONL file is not an object with a string under "text".
    """
    for identity, text, source in _documents(name):
        for index, piece in enumerate(cut(text, longest)):
            yield Passage(f"{identity}#{index}", piece, source)


def _documents(name: str) -> Iterable[tuple[str, str, str]]:
    if not is_file(name):
        with needs("testbed", "corpus " + name):
            import testbed
        return ((d.id, d.text, name) for d in testbed.corpus(name))
    return _read_jsonl(Path(name).expanduser())


def _read_jsonl(path: Path) -> Iterator[tuple[str, str, str]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: expected a JSON object with a key 'text' on each line, "
                    f"got {line[:40]!r} ({type(error).__name__}): repair or remove the line"
                ) from None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: 'text' is {type(text).__name__}, not a string")
            yield (
                str(record.get("id", f"{path.stem}:{number}")),
                text,
                str(record.get("source", path.stem)),
            )


def cut(text: str, longest: int) -> Iterator[str]:
    """Cut a text into pieces of at most `longest` characters, at paragraphs where it can be."""
    piece = ""
    for paragraph in text.split("\n\n"):
        # A single paragraph beyond the limit is cut at the last space before it.
        while len(paragraph) > longest:
            at = paragraph.rfind(" ", 1, longest)
            at = at if at > 0 else longest
            if piece.strip():
                yield piece.strip()
            piece = ""
            yield paragraph[:at].strip()
            paragraph = paragraph[at:].lstrip()
        if len(piece) + len(paragraph) + 2 > longest:
            if piece.strip():
                yield piece.strip()
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece.strip():
        yield piece.strip()


def rank(name: str, salt: str) -> float:
    """A number in 0..1 that a name always has, and that looks random."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def in_share(identity: str, share: float, salt: str) -> bool:
    """Whether a document falls into a share of all, decided by its name alone.

    All passages of a document fall the same way, whatever their order and number.
    """
    return rank(identity.rsplit("#", 1)[0], salt) < share

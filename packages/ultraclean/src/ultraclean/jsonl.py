"""JSON lines in, plain or compressed, with where each line begins; nothing is silently skipped."""

from __future__ import annotations

import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

COLUMNS = ("ultraclean_score", "ultraclean_reason")
"""What a filter adds to a line."""
BLOCK_BYTES = 1 << 20
LONGEST = 1 << 24
"""Bytes of the longest line that is read whole; a longer one is malformed, reason "too long"."""


def open_text(path: Path) -> BinaryIO:
    """Open a .jsonl, .jsonl.gz or .jsonl.zst file for reading bytes.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: a compressed file without a byte.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"input {path} {what}: expected a .jsonl, .jsonl.gz or .jsonl.zst file"
        )
    if path.suffix in (".gz", ".zst") and path.stat().st_size == 0:
        raise ValueError(f"{path} is damaged or cut short (0 bytes): fetch or write it again")
    if path.suffix == ".gz":
        from isal import igzip  # some three times as quick as the standard library's

        return igzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 20)
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """Zstandard frames as one stream; unlike the library's reader, it notices a cut-off end."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame, self._started, self._ready = self._new(), False, b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: bytearray | memoryview) -> int:
        while not self._ready:
            if self._frame.eof:  # files may hold several frames, one after the other
                data, self._frame, self._started = self._frame.unused_data, self._new(), False
            else:
                data = b""
            data = data or self._file.read(1 << 18)
            if not data:
                if self._started:
                    raise EOFError("the last frame does not end")
                return 0
            self._started = True
            self._ready = self._frame.decompress(data)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


class Block(NamedTuple):
    """Whole lines of one file."""

    first: int
    """Number of its first line, from 1."""
    data: bytes


def blocks(path: Path, longest: int = LONGEST, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """A file in blocks of lines. Where one ends depends on the file alone.

    Of a line of more than `longest` bytes only the first `longest` + 1 are given, so that one
    without an end cannot fill the memory; `parse` knows it by that.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: the compressed stream is damaged or cut short, or the file is not text.
    """
    import zstandard
    from isal import isal_zlib

    damage = (EOFError, gzip.BadGzipFile, zlib.error, isal_zlib.error, zstandard.ZstdError)
    number, waiting = 1, b""
    try:
        with open_text(path) as stream:
            data = stream.read(size)
            _refuse_binary(path, data)
            data = data.removeprefix(b"\xef\xbb\xbf")
            while data:
                waiting += data
                cut = waiting.rfind(b"\n") + 1
                if not cut and len(waiting) > longest:
                    # A line that is too long: its start, and nothing up to its end.
                    tail = b""
                    while data and (end := data.find(b"\n")) < 0:
                        data = stream.read(size)
                    if data:
                        tail = data[end + 1 :]
                    yield Block(number, waiting[: longest + 1])
                    number, waiting = number + 1, tail
                    cut = waiting.rfind(b"\n") + 1
                if cut:
                    whole, waiting = waiting[:cut], waiting[cut:]
                    yield Block(number, whole)
                    number += whole.count(b"\n")
                data = stream.read(size)
            if waiting:
                yield Block(number, waiting)
    except damage as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): fetch or write it again"
        ) from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content without the newline) of each line; see `blocks`."""
    for first, data in blocks(path):
        yield from enumerate(data.removesuffix(b"\n").split(b"\n"), first)


def _refuse_binary(path: Path, data: bytes) -> None:
    for start, suffix in ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst")):
        if data.startswith(start):
            raise ValueError(f"{path} is a {suffix} file by its content: rename it to end so")
    if b"\0" in data[:4096].partition(b"\n")[0]:
        raise ValueError(f"{path} is a binary file: expected JSON lines")


def parse(line: bytes, text_key: str, longest: int = LONGEST) -> tuple[dict[str, Any] | None, str]:
    """(record, "") for a usable line; (None, reason) for one that is not.

    Args:
        line: as `lines` gives it.
        text_key: the column that must be a string with something in it.
        longest: as in `lines`.
    """
    if len(line) > longest:
        return None, "too long"
    try:
        record = orjson.loads(line)
    except ValueError:
        # NaN, a lone surrogate or deep nesting are to Python's own reader; else it says what is
        # wrong.
        record, reason = parse_plainly(line)
        if reason:
            return None, reason
    if not isinstance(record, dict):
        return None, "not an object"
    if text_key not in record:
        return None, f"no key {text_key!r}"
    text = record[text_key]
    if text is None:
        return None, f"{text_key!r} is null"
    if not isinstance(text, str):
        return None, f"{text_key!r} is not a string"
    if not text.strip():
        return None, "empty"
    return record, ""


def parse_plainly(line: bytes) -> tuple[Any, str]:
    """(value, "") of a line, numbers to their last digit; or (None, reason)."""
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "bad JSON"


_quoted = functools.lru_cache(64)(json.dumps)  # reasons are few


def _written(value: float | str) -> str:
    """As `json.dumps` has it, in a fifth of the time."""
    return repr(value) if isinstance(value, float) else _quoted(value)


def with_columns(line: bytes, record: dict[str, Any], columns: dict[str, Any]) -> bytes:
    """The line with some of `COLUMNS` added, and all else as it was, byte for byte.

    Args:
        line: a JSON object as read.
        record: the same, parsed.
        columns: what to add; those of an earlier run are removed.

    Returns:
        one line with its newline.
    """
    whole = line.rstrip()
    if b"\r" in whole or not record.keys().isdisjoint(COLUMNS):
        exact, _ = parse_plainly(whole)
        kept = {name: value for name, value in (exact or record).items() if name not in COLUMNS}
        return json.dumps({**kept, **columns}).encode() + b"\n"
    if not columns:
        return whole + b"\n"
    # Spliced in before the brace that ends the object. Writing the record anew would round numbers
    # beyond double precision, and take longer.
    added = ", ".join([f'"{name}": {_written(value)}' for name, value in columns.items()])
    return b"%b, %b}\n" % (whole[:-1].rstrip(), added.encode())

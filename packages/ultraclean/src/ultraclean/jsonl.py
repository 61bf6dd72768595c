"""JSON lines in, plain or compressed, with where each line begins; nothing is silently skipped."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def open_text(path: Path) -> BinaryIO:
    """Open a .jsonl, .jsonl.gz or .jsonl.zst file for reading bytes.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"input {path} {what}: expected a .jsonl, .jsonl.gz or .jsonl.zst file"
        )
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
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


def lines(path: Path, skip: int = 0) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of each line, beginning after `skip` lines.

    Raises:
        ValueError: the compressed stream is damaged or cut short, or the file is not text.
    """
    import zstandard

    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1 and b"\0" in line[:4096]:
                    raise ValueError(f"{path} is a binary file: expected JSON lines")
                if number > skip:
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): fetch or write it again"
        ) from None


def parse(line: bytes, text_key: str) -> tuple[dict[str, Any] | None, str]:
    """(record, "") for a usable line; (None, reason) for one that is not."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "bad JSON"
    if not isinstance(record, dict):
        return None, "not an object"
    if text_key not in record:
        return None, f"no key {text_key!r}"
    text = record[text_key]
    if not isinstance(text, str):
        return None, f"{text_key!r} is not a string"
    if not text.strip():
        return None, "empty"
    return record, ""

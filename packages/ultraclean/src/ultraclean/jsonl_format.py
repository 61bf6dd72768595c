"""JSON lines through the filter: a block of lines to texts, and back with what was decided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultraclean.jsonl import Block, blocks, open_text, parse, parse_plainly, with_columns
from ultraclean.packing import pack

SHOWN_BYTES = 1000  # of a line too long to repeat
SHOWN_CHARS = 300  # of a source's name


@dataclass
class Rows:
    """The rows of a block.

    Attributes:
        numbers: of each row in its file, from 1.
        texts: of each row; "" where there is none.
        problems: why a row holds no text; "" where it does, "blank" for nothing at all.
        sources: where each is from.
        content: the format's own.
    """

    numbers: list[int]
    texts: list[str]
    problems: list[str]
    sources: list[str]
    content: Any


class JsonLines:
    """Lines in, lines out: what a line holds stays as it was, byte for byte.

    Args:
        text_key, source_key: columns.
        max_bytes: a longer line is malformed.
        packing: "", "gz" or "zst": of the outputs.
    """

    def __init__(self, text_key: str, source_key: str, max_bytes: int, packing: str = "") -> None:
        self.text_key, self.source_key, self.max_bytes = text_key, source_key, max_bytes
        self.packing = packing
        self.suffix = ".jsonl" + (f".{packing}" if packing else "")

    def check(self, path: Path) -> None:
        """Raise what is wrong with an input that can be known at once."""
        open_text(path).close()

    def blocks(self, path: Path) -> Iterator[Block]:
        """An input in pieces, always the same."""
        return blocks(path, self.max_bytes)

    def parse(self, block: Block) -> Rows:
        """The rows of a block."""
        lines = block.data.removesuffix(b"\n").split(b"\n")
        rows = Rows(list(range(block.first, block.first + len(lines))), [], [], [], [])
        for raw in lines:
            blank = not raw.strip()
            record, why = (None, "blank") if blank else parse(raw, self.text_key, self.max_bytes)
            source = None if record is None else record.get(self.source_key)
            if isinstance(source, float | list | dict):  # the quick reader rounds long integers
                source = (parse_plainly(raw)[0] or record).get(self.source_key)
            rows.texts.append("" if record is None else record[self.text_key])
            rows.problems.append(why)
            rows.sources.append("" if source is None else utf8(str(source)[:SHOWN_CHARS]))
            rows.content.append((raw, record))
        return rows

    def header(self) -> bytes:
        """What each output begins with."""
        return b""

    def render(
        self, path: Path, rows: Rows, scores: list[float | None], reasons: list[str]
    ) -> dict[str, bytes]:
        """What each output gets of a block, packed."""
        out: dict[str, list[bytes]] = {"kept": [], "rejected": [], "malformed": []}
        for i, (raw, record) in enumerate(rows.content):
            if record is not None:
                score = scores[i]
                columns: dict[str, Any] = {} if score is None else {"ultraclean_score": score}
                if reasons[i]:
                    columns["ultraclean_reason"] = reasons[i]
                stream = "rejected" if reasons[i] else "kept"
                out[stream].append(with_columns(raw, record, columns))
            elif rows.problems[i] != "blank":
                out["malformed"].append(malformed(path, rows.numbers[i], rows.problems[i], raw))
        return {name: pack(b"".join(lines), self.packing) for name, lines in out.items()}

    def finish(self, partial: Path, final: Path) -> None:
        """Give a whole output its name."""
        partial.replace(final)


def utf8(text: str) -> str:
    """With "?" for lone surrogates: legal in JSON as escapes and in file names, not in UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def malformed(path: Path, number: int, reason: str, raw: bytes) -> bytes:
    """A line about a line that holds no text."""
    raw = raw[:SHOWN_BYTES] if reason == "too long" else raw.rstrip(b"\r\n")
    record = {
        "file": utf8(str(path)),
        "line": number,
        "reason": reason,
        "raw": raw.decode("utf-8", "backslashreplace"),
    }
    return json.dumps(record).encode() + b"\n"

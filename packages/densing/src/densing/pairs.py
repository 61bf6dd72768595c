"""Prompts and answers from JSON lines, and the file of losses that a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer. `id` is the line's own, or its number."""

    id: str
    prompt: str
    answer: str


def read_pairs(path: str | Path) -> list[Pair]:
    """Read JSON lines with the keys `prompt` and `answer` (and `id`, if there is one).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not such an object, an empty answer, or an id that stands twice;
            the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} does not exist: give JSON lines of prompt and answer")
    pairs, seen = [], set()
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                prompt, answer = record["prompt"], record["answer"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: expected a JSON object with 'prompt' and 'answer', got "
                    f"{line[:40]!r}"
                ) from None
            if not (isinstance(prompt, str) and isinstance(answer, str) and answer):
                raise ValueError(
                    f"{path}:{number}: prompt and answer must be text, answer not empty"
                )
            identity = str(record.get("id", number))
            if identity in seen:
                raise ValueError(f"{path}:{number}: the id {identity!r} stands twice")
            seen.add(identity)
            pairs.append(Pair(identity, prompt, answer))
    if not pairs:
        raise ValueError(f"{path} has no pairs")
    return pairs


def pairs_hash(pairs: Sequence[Pair]) -> str:
    """SHA-256 of ids, prompts and answers, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.id, pair.prompt, pair.answer]).encode())
    return digest.hexdigest()


def resume(out: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `out` already holds; starts it where it is new, cuts a line that a kill left torn."""
    if not out.exists() or not out.stat().st_size:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    whole, done = [], {}
    for line in _lines(out):
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not whole or whole[0] != header:
        raise ValueError(
            f"{out} holds losses of other pairs, another tokenizer or context: give another file"
        )
    for record in whole[1:]:
        done[record["id"]] = record
    out.write_text("".join(json.dumps(r) + "\n" for r in whole), encoding="utf-8")
    return done


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield line

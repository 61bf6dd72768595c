"""Texts to train on: plain text in windows, or prompts with their answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from locret.training import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_texts(path: str | Path) -> Iterator[str | tuple[str, str]]:
    """Texts, or (prompt, answer), of a .txt or .jsonl file, or of a folder of them, in name order.

    A line of JSON has `text`, or `prompt` and `answer`.

    Raises:
        FileNotFoundError: no such path.
        ValueError: another kind of file, or a line that is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .txt or .jsonl file, or a folder")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
        if not files:
            raise ValueError(f"{path} holds no .txt or .jsonl file")
        for file in files:
            yield from read_texts(file)
    elif path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _of_line(line, f"{path}:{number}")
    else:
        raise ValueError(f"{path}: expected .txt or .jsonl, got {path.suffix or 'no suffix'!r}")


def examples(
    texts: Iterable[str | tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *,
    length: int = 1024, answer: int = 128, count: int | None = None,
) -> list[Example]:  # fmt: skip
    """Windows of text whose last `answer` tokens are the answer; prompts and answers as they are.

    Args:
        texts: see `read_texts`.
        tokenizer: the model's.
        length: tokens of a window; shorter rests are dropped. Of a longer prompt the middle goes.
        answer: of a window.
        count: take this many, one of each document in turn, so that a few come from many.

    Raises:
        ValueError: no text is long enough, or sizes that leave no prompt.
    """
    if not 0 < answer < length:
        raise ValueError(f"answer must lie between 1 and length − 1 = {length - 1}, got {answer}")
    queues: list[list[Example]] = []
    for text in texts:
        if isinstance(text, tuple):
            queues.append([_pair(*text, tokenizer, length)])
            continue
        ids = _ids(text, tokenizer)
        queues.append([Example(part, answer) for part in ids.split(length) if len(part) == length])
    found = []
    for turn in range(max((len(q) for q in queues), default=0)):
        found += [queue[turn] for queue in queues if turn < len(queue)]
    if not found:
        raise ValueError(f"no text has {length} tokens: lower --length or give longer texts")
    if count is None or count >= len(found):
        return found
    step = len(found) / count
    return [found[int(i * step)] for i in range(count)]


def _pair(prompt: str, answer: str, tokenizer: Any, length: int) -> Example:
    p, a = _ids(prompt, tokenizer), _ids(answer, tokenizer)
    if not len(p) or not len(a) or len(a) >= length:
        raise ValueError(
            f"a prompt of {len(p)} and an answer of {len(a)} tokens: both need one, and the answer "
            f"must be shorter than --length {length}"
        )
    room = length - len(a)
    if len(p) > room:
        p = torch.cat([p[: room // 2], p[len(p) - (room - room // 2) :]])
    return Example(torch.cat([p, a]), len(a))


def _ids(text: str, tokenizer: Any) -> torch.Tensor:
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )


def _of_line(line: str, where: str) -> str | tuple[str, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return entry["text"]
        if isinstance(entry.get("prompt"), str) and isinstance(entry.get("answer"), str):
            return entry["prompt"], entry["answer"]
    raise ValueError(f'{where} has neither "text" nor "prompt" and "answer"')

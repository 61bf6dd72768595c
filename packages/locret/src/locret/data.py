"""Texts to train on: plain text in windows, or prompts with their answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from locret.facts import strewn
from locret.training import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A text, or (prompt, question, answer); the question may be empty.
Text = str | tuple[str, str, str]

QUERY = 32  # tokens of a plain text's continuation that stand for a question
REPEAT = "\n\nRepeat the previous context exactly.\n\n"


def read_texts(path: str | Path) -> Iterator[Text]:
    """Texts, or prompts with question and answer, of a .txt or .jsonl file, or of a folder of them.

    A line of JSON has `text`, or `prompt`, `answer` and perhaps `question`. Files in name order.

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
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, *,
    length: int = 1024, answer: int = 128, count: int | None = None, query_aware: bool = False,
    facts: float = 0.0, repeats: float = 0.0,
) -> list[Example]:  # fmt: skip
    """Windows of text whose last `answer` tokens are the answer; prompts and answers as they are.

    Args:
        texts: see `read_texts`.
        tokenizer: the model's.
        length: tokens of a window; shorter rests are dropped. Of a longer prompt the middle goes.
        answer: of a window.
        count: take this many, one of each document in turn, so that a few come from many.
        query_aware: for Locret-Q, put the question before the prompt too; a window's question is
            the first quarter of its answer, `QUERY` tokens at most.
        facts: share of the windows that get facts and questions, see `varied`; pairs stay.
        repeats: share of the windows that are said twice, see `varied`; pairs stay.

    Raises:
        ValueError: no text is long enough, sizes that leave no prompt, shares that are none or
            more than all, or a prompt without its question where the heads are to know it.
    """
    if not (facts >= 0 and repeats >= 0 and facts + repeats <= 1):
        raise ValueError(
            f"facts and repeats must be shares from 0 to 1, and 1 together at most; got {facts} "
            f"and {repeats}"
        )
    if (facts or repeats) and query_aware:
        raise ValueError("facts and repeats are for heads that do not know the question: give 0")
    if not 0 < answer < length:
        raise ValueError(f"answer must lie between 1 and length − 1 = {length - 1}, got {answer}")
    queues: list[list[Example]] = []
    pairs: set[int] = set()  # which of them are no plain text
    for text in texts:
        if isinstance(text, tuple):
            queues.append([_pair(*text, tokenizer, length, query_aware)])
            pairs.add(id(queues[-1][0]))
            continue
        whole = [part for part in _ids(text, tokenizer).split(length) if len(part) == length]
        if query_aware:
            first = max(1, min(QUERY, answer // 4))
            queues.append([asked(part, answer, first) for part in whole])
        else:
            queues.append([Example(part, answer) for part in whole])
    found = []
    for turn in range(max((len(q) for q in queues), default=0)):
        found += [queue[turn] for queue in queues if turn < len(queue)]
    if not found:
        raise ValueError(f"no text has {length} tokens: lower --length or give longer texts")
    if count is not None and count < len(found):
        step = len(found) / count
        found = [found[int(i * step)] for i in range(count)]
    if not facts and not repeats:
        return found
    plain = varied([e for e in found if id(e) not in pairs], facts, repeats, tokenizer)
    new = iter(plain)
    return [e if id(e) in pairs else next(new) for e in found]


def varied(windows: list[Example], facts: float, repeats: float, tokenizer: Any) -> list[Example]:
    """Windows of plain text, some of them made to look at more than prose does.

    Args:
        windows: plain, in their order; those too short for what they should become stay.
        facts: share that gets facts strewn in, and their questions at the end: see `locret.facts`.
        repeats: share whose first half is asked for again, word for word: see `repeated`.
        tokenizer: the model's.
    """
    found = []
    asked_for = again = 0
    for i, window in enumerate(windows):
        changed = None
        if int((i + 1) * facts + 1e-9) > asked_for:
            asked_for += 1
            changed = strewn(tokenizer.decode(window.ids), tokenizer, len(window.ids), seed=i)
        elif int((i + 1) * repeats + 1e-9) > again:
            again += 1
            changed = repeated(window, tokenizer)
        found.append(changed or window)
    return found


def repeated(window: Example, tokenizer: Any) -> Example | None:
    """The first half of a window twice: whoever repeats a text looks at all of it.

    Heads learn from it what KVzip (arXiv 2505.23416) finds out by making the model repeat every
    context that it compresses.

    Returns:
        a window of at most as many tokens, whose answer is the second time; None where the request
        leaves less than half of it for the text.
    """
    ask = _ids(REPEAT, tokenizer)
    room = (len(window.ids) - len(ask)) // 2
    if 4 * room < len(window.ids):
        return None
    text = window.ids[:room]
    return Example(torch.cat([text, ask, text]), room)


def asked(ids: torch.Tensor, answer: int, first: int) -> Example:
    """The text for Locret-Q: the first tokens of its end also stand before it.

    Args:
        ids: int64 `[T]`.
        answer: tokens at its end, question included.
        first: tokens of them that are the question.
    """
    start = len(ids) - answer
    return Example(torch.cat([ids[start : start + first], ids]), answer, first)


def _pair(
    prompt: str, question: str, answer: str, tokenizer: Any, length: int, query_aware: bool
) -> Example:
    p, q, a = (_ids(text, tokenizer) for text in (prompt, question, answer))
    if query_aware and not len(q):
        raise ValueError("query-aware heads learn from lines with prompt, question and answer")
    first = len(q) if query_aware else 0
    # Where the question's rows are known they make labels too; else it ends the prompt.
    p, a = (p, torch.cat([q, a])) if query_aware else (torch.cat([p, q]), a)
    if not len(p) or not len(a) or len(a) >= length:
        raise ValueError(
            f"a prompt of {len(p)} and an answer of {len(a)} tokens: both need one, and the answer "
            f"must be shorter than --length {length}"
        )
    room = length - len(a)
    if len(p) > room:
        p = torch.cat([p[: room // 2], p[len(p) - (room - room // 2) :]])
    ids = torch.cat([p, a])
    return asked(ids, len(a), first) if first else Example(ids, len(a))


def _ids(text: str, tokenizer: Any) -> torch.Tensor:
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )


def _of_line(line: str, where: str) -> Text:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return entry["text"]
        if isinstance(entry.get("prompt"), str) and isinstance(entry.get("answer"), str):
            question = entry.get("question", "")
            if isinstance(question, str):
                return entry["prompt"], question, entry["answer"]
    raise ValueError(f'{where} has neither "text" nor "prompt" and "answer"')

"""What a task's generator makes, before its length is known, and the word lists it draws from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Draft:
    """A sample without its token count; fields as in `RulerSample`."""

    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    depths: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A generator of drafts.

    Args:
        build: (key, size, tokens, count) -> Draft. `key` seeds everything random: two sizes of one
            key share their needles. `size` is the haystack's, in the task's own unit. `tokens` is
            the length asked for, `count` counts a text's tokens.
        least: the smallest size that makes sense.
        most: the largest there is material for, or None.
        max_new_tokens: RULER's `tokens_to_generate`.
    """

    build: Callable[[str, int, int, Callable[[str], int]], Draft]
    least: int
    most: Callable[[], int] | None
    max_new_tokens: int


def rng(key: str, purpose: str) -> Random:
    """A random stream of its own for one purpose in one sample; equal on every platform."""
    return Random(f"{key}/{purpose}")


@functools.cache
def word_list(kind: str) -> tuple[str, ...]:
    """The words of `wonderwords`, as RULER takes them: "noun", "adjective" or "verb"."""
    from importlib.resources import files

    text = files("wonderwords").joinpath("assets", f"{kind}list.txt").read_text("utf-8")
    return tuple(sorted({word for line in text.splitlines() if (word := line.strip())}))

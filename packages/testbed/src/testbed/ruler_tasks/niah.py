"""Needles in a haystack: RULER's eight retrieval tasks (paper, section 3.1 and appendix B).

The wording is RULER's (NVIDIA, Apache-2.0), since scores depend on it: scripts/data/synthetic.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from .draft import Draft, Task, rng, word_list

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# With one needle asked for RULER puts its template in the singular.
_ASK_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
_ASK_MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {query} mentioned in the provided text?"
)
_PREFIX_ONE = "The special magic {kind} for {query} mentioned in the provided text is"
_PREFIX_MANY = "The special magic {kind}s for {query} mentioned in the provided text are"

# 40 depths from 0 to 100 % of the essay's sentences, both ends included.
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True, kw_only=True, slots=True)
class Niah:
    """Settings of one task, RULER's `type_haystack`, `type_needle_k|v` and `num_needle_k|v|q`."""

    haystack: Literal["noise", "essay", "needle"] = "essay"
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def build(self, key: str, size: int, tokens: int, count: Callable[[str], int]) -> Draft:
        """A draft with a haystack of `size` words (essay) or sentences (noise, needle)."""
        random = rng(key, "needles")
        names = _distinct(random, self.key, self.keys)
        values = _distinct(random, self.value, self.keys * self.values)
        pairs = [(names[i // self.values], value) for i, value in enumerate(values)]
        asked = random.sample(range(self.keys), self.queries)
        answers = [values[i * self.values + j] for i in asked for j in range(self.values)]

        kind = f"{self.value}s"
        needles = {v: _NEEDLE.format(kind=kind, key=k, value=v) for k, v in pairs}
        order = list(needles.values())
        random.shuffle(order)
        context = self._context(key, size, order, set(names))

        query = _listed([names[i] for i in asked])
        one = len(answers) == 1
        return Draft(
            prompt=(_ASK_ONE if one else _ASK_MANY).format(
                kind=self.value, context=context, query=query
            ),
            answer_prefix=(_PREFIX_ONE if one else _PREFIX_MANY).format(
                kind=self.value, query=query
            ),
            answers=tuple(answers),
            depths=tuple(context.index(needles[a]) / len(context) for a in answers),
        )

    def _context(self, key: str, size: int, needles: list[str], names: set[str]) -> str:
        random = rng(key, "places")
        if self.haystack == "essay":
            sentences = _sentences(" ".join(essay_words(size)))
            depths = sorted(random.sample(_DEPTHS, len(needles)))
            places = [len(sentences) * depth // 100 for depth in depths]
            separator = " "
        else:
            sentences = (
                [NOISE] * size if self.haystack == "noise" else self._distractors(key, size, names)
            )
            places = sorted(random.sample(range(size), len(needles)))
            separator = "\n"
        # From the last, so that the places before it stay right.
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            sentences.insert(place, needle)
        return separator.join(sentences)

    def _distractors(self, key: str, size: int, names: set[str]) -> list[str]:
        random = rng(key, "haystack")
        found: list[str] = []
        while len(found) < size:
            name = _draw(random, self.key)
            value = _draw(random, self.value)
            # RULER leaves a key that is drawn twice in; the question would have two answers.
            if name not in names:
                found.append(_NEEDLE.format(kind=f"{self.value}s", key=name, value=value))
        return found


def niah_tasks() -> dict[str, Task]:
    """RULER's eight tasks of this family, by name."""
    settings = {
        "niah_single_1": Niah(haystack="noise"),
        "niah_single_2": Niah(),
        "niah_single_3": Niah(value="uuid"),
        "niah_multikey_1": Niah(keys=4),
        "niah_multikey_2": Niah(haystack="needle"),
        "niah_multikey_3": Niah(haystack="needle", key="uuid", value="uuid"),
        "niah_multivalue": Niah(values=4),
        "niah_multiquery": Niah(keys=4, queries=4),
    }
    return {
        name: Task(build=s.build, least=s.keys * s.values, most=None, max_new_tokens=128)
        for name, s in settings.items()
    }


def essay_words(count: int) -> list[str]:
    """The first `count` words of all essays in a row, from the start again when they end."""
    words = _essays()
    return (words * (count // len(words) + 1))[:count]


@functools.cache
def _essays() -> list[str]:
    from ..texts import corpus

    return [word for document in corpus("essays") for word in document.text.split()]


def _sentences(text: str) -> list[str]:
    # RULER takes NLTK's sentences. Ours may split at "Mr. X" too: a needle can stand there as well.
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+", text)


def _draw(random: Random, kind: str) -> str:
    if kind == "word":
        return f"{random.choice(word_list('adjective'))}-{random.choice(word_list('noun'))}"
    if kind == "number":
        return str(random.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def _distinct(random: Random, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw(random, kind)] = None
    return list(found)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"

"""Common and frequent words: RULER's aggregation tasks (paper, section 3.3).

The wording is RULER's (NVIDIA, Apache-2.0).
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable
from random import Random

from .draft import Draft, Task, rng, word_list

_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10
# RULER: a common word 30 times, the others 3 times; below 4096 tokens 6 times and once. Its solved
# example has 10 and 3, or 3 and 1, and 40 or 20 words.
_LONG, _SHORT = (30, 3, 40, 10, 3), (6, 1, 20, 3, 1)
_LONG_FROM = 4096

_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
_FWE_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
_EXPONENT = 2.0
_ZETA = math.pi**2 / 6  # Riemann zeta of that exponent
_LETTERS = 6
_TOKENS_PER_WORD = 50  # vocabulary size is the length asked for, divided by this


def cwe_task() -> Task:
    """Ten words stand out of a numbered list; `size` is the number of different words."""
    return Task(
        build=_cwe, least=_COMMON + 1, most=lambda: len(_all_words()) - 40, max_new_tokens=120
    )


def fwe_task() -> Task:
    """Made-up words by Zipf's law, the first rank being dots; `size` is the number of draws."""
    # From 64 draws up the third and the fourth rank differ by at least one.
    return Task(build=_fwe, least=64, most=None, max_new_tokens=50)


def _cwe(key: str, size: int, tokens: int, count: Callable[[str], int]) -> Draft:
    common, rare, example_words, example_common, example_rare = (
        _LONG if tokens >= _LONG_FROM else _SHORT
    )
    words = rng(key, "words").sample(_all_words(), len(_all_words()))
    # The example's words come from the list's end, so they do not grow into the question's.
    shown, shown_answers = _numbered(
        rng(key, "example order"), words[-example_words:], example_common, example_rare
    )
    context, answers = _numbered(rng(key, "order"), words[:size], common, rare)
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(shown_answers, 1))
    example = f"{_CWE.format(context=shown)} {_CWE_PREFIX} {solved}\n"
    return Draft(example + _CWE.format(context=context), _CWE_PREFIX, answers)


def _numbered(
    random: Random, words: list[str], common: int, rare: int
) -> tuple[str, tuple[str, ...]]:
    entries = words[:_COMMON] * common + words[_COMMON:] * rare
    random.shuffle(entries)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    return listed, tuple(words[:_COMMON])


@functools.cache
def _all_words() -> list[str]:
    return sorted({w for kind in ("noun", "adjective", "verb") for w in word_list(kind)})


def _fwe(key: str, size: int, tokens: int, count: Callable[[str], int]) -> Draft:
    random = rng(key, "words")
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < max(tokens // _TOKENS_PER_WORD, 5):
        vocabulary["".join(random.choices(string.ascii_lowercase, k=_LETTERS))] = None
    ranked = ["...", *list(vocabulary)[1:]]
    text: list[str] = []
    for rank, word in enumerate(ranked, 1):
        text += [word] * int(size * rank**-_EXPONENT / _ZETA)
    rng(key, "order").shuffle(text)
    return Draft(_FWE.format(context=" ".join(text)), _FWE_PREFIX, tuple(ranked[1:4]))

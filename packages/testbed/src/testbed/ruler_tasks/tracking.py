"""Variable tracking: RULER's multi-hop task (paper, section 3.2).

The wording is RULER's (NVIDIA, Apache-2.0), with "assigned" spelt as in the paper's appendix.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from random import Random

from .draft import Draft, Task, rng
from .niah import NOISE

_HOPS = 4
_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {many} variables "
    "are assigned the value {value}, they are:"
)
# RULER shows one solved example of up to 500 tokens first, filled in steps of 5 noise sentences.
_EXAMPLE_TOKENS = 500
_EXAMPLE_STEP = 5


def vt_task() -> Task:
    """One chain of four hops: five names hold the value."""
    return Task(build=_build, least=_HOPS + 1, most=None, max_new_tokens=30)


def _build(key: str, size: int, tokens: int, count: Callable[[str], int]) -> Draft:
    draft = _chain(rng(key, "chain"), rng(key, "places"), size, letters=5)
    # At RULER's lengths (4096 up) the example is small; at short ones it must leave room.
    limit = min(_EXAMPLE_TOKENS, tokens // 2)
    noise = _EXAMPLE_STEP
    example = _example(key, noise)
    while count(longer := _example(key, noise + _EXAMPLE_STEP)) <= limit:
        example, noise = longer, noise + _EXAMPLE_STEP
    return Draft(example + draft.prompt, draft.answer_prefix, draft.answers, draft.depths)


def _example(key: str, noise: int) -> str:
    solved = _chain(rng(key, "example"), rng(key, "example places"), noise, letters=3)
    return f"{solved.prompt} {solved.answer_prefix} {' '.join(solved.answers)}\n\n"


def _chain(random: Random, places: Random, size: int, *, letters: int) -> Draft:
    names: dict[str, None] = {}
    while len(names) <= _HOPS:
        names["".join(random.choices(string.ascii_uppercase, k=letters))] = None
    answers = tuple(names)
    value = random.randint(10_000, 99_998)
    statements = [f"VAR {answers[0]} = {value}"]
    statements += [f"VAR {new} = VAR {old}" for old, new in zip(answers, answers[1:], strict=False)]
    sentences = [NOISE] * size
    # In order: a name is assigned before it is used.
    spots = sorted(places.sample(range(size), len(statements)))
    for offset, (spot, statement) in enumerate(zip(spots, statements, strict=True)):
        sentences.insert(spot + offset, statement)
    context = "\n".join(sentences)
    return Draft(
        prompt=_TEMPLATE.format(context=context, value=value),
        answer_prefix=_PREFIX.format(many=len(answers), value=value),
        answers=answers,
        depths=tuple((context + "\n").index(s + "\n") / len(context) for s in statements),
    )

"""Facts strewn over prose: where they stand, how they are asked for, which windows get them."""

from __future__ import annotations

import random

import pytest

testbed = pytest.importorskip("testbed")

from locret.data import examples  # noqa: E402
from locret.facts import FORMS, facts, strewn  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(testbed.smollm2_path())


@pytest.fixture(scope="module")
def prose():
    return [d.text for d in testbed.corpus("wikipedia", "test") if len(d.text) > 8000][:3]


def test_every_fact_stands_in_the_prose_and_is_asked_for_once(tokenizer, prose) -> None:
    for seed in range(12):
        window = strewn(prose[seed % 3], tokenizer, 512, seed)
        assert len(window.ids) <= 512 and window.query == 0
        cut = len(window.ids) - window.answer
        context, end = tokenizer.decode(window.ids[:cut]), tokenizer.decode(window.ids[cut:])
        pairs = facts(5, random.Random(seed))
        assert end.count("Question:") == 5
        for fact, line in pairs:
            assert context.count(fact) == 1 and end.count(line) == 1
            value = line.split("Answer: ")[1].rstrip(".").removesuffix(" crowns").split()[-1]
            assert value in fact


def test_a_question_has_one_answer() -> None:
    for seed in range(200):
        lines = [line.split("Answer:")[0] for _, line in facts(8, random.Random(seed))]
        assert len(set(lines)) == 8
    assert not any("magic" in text for form in FORMS for text in form)  # RULER's word


def test_the_share_is_of_plain_windows_alone(tokenizer, prose) -> None:
    pair = ("Some words. " * 60, " Which words?", " Some.")
    texts = [pair, *prose, pair, pair]
    plain = examples(texts, tokenizer, length=256, answer=32, count=16)
    for share in (0.0, 0.25, 0.5, 1.0):
        found = examples(texts, tokenizer, length=256, answer=32, count=16, facts=share)
        asked = ["Question:" in tokenizer.decode(e.ids) for e in found]
        pairs = sum("Which words" in tokenizer.decode(e.ids) for e in plain)
        assert pairs and sum(asked) == int(share * (16 - pairs))
        same = [a.ids.tolist() == b.ids.tolist() for a, b in zip(plain, found, strict=True)]
        assert same == [not a for a in asked]  # the others, and pairs, are as they were


def test_windows_too_short_stay(tokenizer, prose) -> None:
    assert strewn(prose[0], tokenizer, 16, 0) is None
    few = strewn(prose[0], tokenizer, 128, 0)
    assert 1 <= tokenizer.decode(few.ids).count("Question:") < 5 and len(few.ids) <= 128
    found = examples(prose, tokenizer, length=16, answer=4, count=8, facts=1.0)
    assert all(len(e.ids) == 16 and e.answer == 4 for e in found)


def test_what_does_not_fit_is_refused(tokenizer, prose) -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            examples(prose, tokenizer, facts=share)
    with pytest.raises(ValueError, match="do not know the question"):
        examples(prose, tokenizer, facts=0.5, query_aware=True)

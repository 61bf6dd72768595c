"""Plain windows made to look at more: facts that are asked for, and texts that are said twice."""

from __future__ import annotations

import random

import pytest
import torch

testbed = pytest.importorskip("testbed")

from locret.data import REPEAT, examples, repeated  # noqa: E402
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


def test_a_repeated_window_is_its_first_half_twice(tokenizer, prose) -> None:
    (plain,) = examples(prose, tokenizer, length=256, answer=32, count=1)
    window = repeated(plain, tokenizer)
    half = window.answer
    assert window.query == 0 and 256 - 1 <= len(window.ids) <= 256
    assert torch.equal(window.ids[:half], plain.ids[:half])
    assert torch.equal(window.ids[-half:], plain.ids[:half])
    assert tokenizer.decode(window.ids[half:-half]) == REPEAT
    (short,) = examples(prose, tokenizer, length=16, answer=4, count=1)
    assert repeated(short, tokenizer) is None  # the request would be most of it


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.25), (0.0, 1.0), (0.3, 0.7), (0.1, 0.2)])
def test_shares_of_both_kinds(tokenizer, prose, shares: tuple[float, float]) -> None:
    plain = examples(prose, tokenizer, length=256, answer=32, count=20)
    found = examples(
        prose, tokenizer, length=256, answer=32, count=20, facts=shares[0], repeats=shares[1]
    )
    texts = [tokenizer.decode(e.ids) for e in found]
    asked = [t.count("\nQuestion:") > 0 for t in texts]
    twice = [REPEAT in t for t in texts]
    assert sum(asked) == round(20 * shares[0])
    # The last may still wait for its turn where both were due at once.
    assert 20 * shares[1] - 1 <= sum(twice) <= 20 * shares[1]
    assert not any(a and t for a, t in zip(asked, twice, strict=True))
    for a, b, changed in zip(plain, found, map(max, asked, twice), strict=True):
        assert changed or torch.equal(a.ids, b.ids)


def test_what_does_not_fit_is_refused(tokenizer, prose) -> None:
    for asked, twice in ((-0.1, 0), (1.1, 0), (0, -0.1), (0.6, 0.6), (float("nan"), 0)):
        with pytest.raises(ValueError, match="shares from 0 to 1"):
            examples(prose, tokenizer, facts=asked, repeats=twice)
    for share in ({"facts": 0.5}, {"repeats": 0.5}):
        with pytest.raises(ValueError, match="do not know the question"):
            examples(prose, tokenizer, query_aware=True, **share)

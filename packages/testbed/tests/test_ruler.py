from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

import testbed
from testbed.ruler_tasks import TASKS
from testbed.ruler_tasks import niah as niah_module

NIAH = {  # keys, values, queries; the haystack
    "niah_single_1": (1, 1, 1, "noise"),
    "niah_single_2": (1, 1, 1, "essay"),
    "niah_single_3": (1, 1, 1, "essay"),
    "niah_multikey_1": (4, 1, 1, "essay"),
    "niah_multikey_2": (1, 1, 1, "needle"),
    "niah_multikey_3": (1, 1, 1, "needle"),
    "niah_multivalue": (1, 4, 1, "essay"),
    "niah_multiquery": (4, 1, 4, "essay"),
}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
BUDGET = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50}


def test_the_eleven_generated_tasks_are_here() -> None:
    assert set(TASKS) == set(BUDGET)


@pytest.mark.parametrize("tokens", [1024, 4096])
@pytest.mark.parametrize("task", list(BUDGET))
def test_length_answers_and_determinism(task: str, tokens: int, tokenizer: Any) -> None:
    samples = testbed.ruler(task, tokens, 2, 5, tokenizer)
    for sample in samples:
        text = testbed.ruler_prompt(sample, tokenizer)
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == sample.tokens
        assert sample.max_new_tokens == BUDGET[task]
        assert 0.9 * tokens <= sample.tokens + sample.max_new_tokens <= tokens
        assert text.endswith(f"<|im_start|>assistant\n{sample.answer_prefix}")
        assert all(answer in sample.prompt for answer in sample.answers)
        assert not any(answer in sample.answer_prefix for answer in sample.answers)
        assert all(0 <= depth <= 1 for depth in sample.depths)
    assert samples[0].answers != samples[1].answers
    assert testbed.ruler(task, tokens, 1, 5, tokenizer) == samples[:1]
    assert testbed.ruler(task, tokens, 1, 6, tokenizer)[0].answers != samples[0].answers


@pytest.mark.parametrize("task", list(NIAH))
def test_needles(task: str, tokenizer: Any) -> None:
    keys, values, queries, haystack = NIAH[task]
    (sample,) = testbed.ruler(task, 2048, 1, 1, tokenizer)
    needles = re.findall(
        r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", sample.prompt
    )
    assert len({value for _, value in needles}) == len(needles)
    if haystack == "needle":
        assert len(needles) > 10
    else:
        assert len(needles) == keys * values
        assert len({key for key, _ in needles}) == keys
    question = sample.prompt.rpartition("\n")[2]
    by_key: dict[str, list[str]] = {}
    for key, value in needles:
        by_key.setdefault(key, []).append(value)
    asked = [key for key in by_key if key in question]
    assert len(asked) == queries
    wanted = [value for key in asked for value in by_key[key]]
    assert sorted(sample.answers) == sorted(wanted)
    assert len(sample.answers) == values * queries == len(sample.depths)
    value = UUID if task in ("niah_single_3", "niah_multikey_3") else r"\d{7}"
    assert all(re.fullmatch(value, answer) for answer in sample.answers)
    key = UUID if task == "niah_multikey_3" else r"[a-z'-]+-[a-z'-]+"
    assert all(re.fullmatch(key, k, re.I) for k in by_key)
    plural = values * queries > 1
    assert sample.prompt.startswith("Some special magic" if plural else "A special magic")
    assert sample.answer_prefix.endswith(" are" if plural else " is")
    # The depth is where the needle begins in the context, between the instruction and the question.
    context = sample.prompt.split("afterwards.\n", 1)[1].rpartition("\n")[0]
    for answer, depth in zip(sample.answers, sample.depths, strict=True):
        start = round(depth * len(context))
        assert re.match(rf"One of the special magic \S+ for \S+ is: {answer}\.", context[start:])


def test_haystacks(tokenizer: Any) -> None:
    (noise,) = testbed.ruler("niah_single_1", 1024, 1, 0, tokenizer)
    assert noise.prompt.count(niah_module.NOISE + "\n") > 20
    (essay,) = testbed.ruler("niah_single_2", 1024, 1, 0, tokenizer)
    first = testbed.corpus("essays")[0].text.split()[:20]
    assert " ".join(first) in essay.prompt
    # Longer than all essays: they start again, as in RULER.
    total = len(niah_module._essays())
    words = niah_module.essay_words(total + 5)
    assert words[total:] == words[:5] and len(words) == total + 5


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_depths_cover_the_context(task: str, tokenizer: Any) -> None:
    samples = testbed.ruler(task, 640, 40, 0, tokenizer)
    depths = sorted(s.depths[0] for s in samples)
    assert depths[0] < 0.15 and depths[-1] > 0.85
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_variable_tracking_by_following_the_chain(tokenizer: Any) -> None:
    (sample,) = testbed.ruler("vt", 2048, 1, 3, tokenizer)
    # A solved example of three-letter names, then the question with five-letter names.
    instruction = "Memorize and track the chain(s)"
    example, question = sample.prompt.split(instruction)[1:]
    assert "VAR" in example and "they are: " in example
    for part, letters in ((example, 3), (question, 5)):
        asked = re.search(r"assigned the value (\d{5}) in the text above", part)
        assert asked is not None
        held: dict[str, str] = {}
        for name, value in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", part):
            held[name] = held.get(value, value)  # in order: a name is assigned before it is used
        wanted = [name for name, value in held.items() if value == asked[1]]
        assert len(wanted) == 5 and all(len(name) == letters for name in wanted)
        if part is question:
            assert tuple(wanted) == sample.answers
            assert list(sample.depths) == sorted(sample.depths)
        else:
            assert " ".join(wanted) == part.rpartition("they are: ")[2].strip()


@pytest.mark.parametrize(
    ("tokens", "common", "rare", "shown"), [(2048, 6, 1, 3), (4096, 30, 3, 10)]
)
def test_common_words_by_counting(
    tokens: int, common: int, rare: int, shown: int, tokenizer: Any
) -> None:
    (sample,) = testbed.ruler("cwe", tokens, 1, 2, tokenizer)
    _, example, question = sample.prompt.split("Below is a numbered list of words.")
    counts = Counter(re.findall(r"\d+\. (\S+)", question.split("\nQuestion")[0]))
    top = counts.most_common(10)
    assert {word for word, _ in top} == set(sample.answers)
    assert {count for _, count in top} == {common}
    assert set(counts.values()) == {common, rare}
    listed, _, solved = example.partition("in the list are:")
    counts = Counter(re.findall(r"\d+\. (\S+)", listed.split("\nQuestion")[0]))
    assert {count for _, count in counts.most_common(10)} == {shown}
    answers = re.findall(r"\d+\. (\S+)", solved)
    assert set(answers) == {word for word, _ in counts.most_common(10)}


@pytest.mark.parametrize("tokens", [512, 1024, 4096])
def test_frequent_words_by_counting(tokens: int, tokenizer: Any) -> None:
    (sample,) = testbed.ruler("fwe", tokens, 1, 2, tokenizer)
    context = sample.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
    ranked = Counter(context.split()).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.answers
    assert ranked[3][1] > ranked[4][1], "a tie would have two right answers"
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    # Zipf with exponent 2: ranks 1 and 2 differ fourfold.
    assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.05)


def test_tokenizer_without_a_chat_template(tokenizer: Any) -> None:
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        (sample,) = testbed.ruler("niah_single_1", 512, 1, 0, tokenizer)
        text = testbed.ruler_prompt(sample, tokenizer)
        assert text == f"{sample.prompt} {sample.answer_prefix}"
        assert len(tokenizer(text).input_ids) == sample.tokens
    finally:
        tokenizer.chat_template = template


def test_distractors_do_not_grow_into_the_needle() -> None:
    short = TASKS["niah_multikey_2"].build("key", 20, 0, len)
    long = TASKS["niah_multikey_2"].build("key", 40, 0, len)
    assert short.answers == long.answers
    assert set(short.prompt.split("\n")) <= set(long.prompt.split("\n"))


def test_the_asked_key_has_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"adjective": ("odd", "even"), "noun": ("cup", "jar")}
    monkeypatch.setattr(niah_module, "word_list", few.__getitem__)
    draft = TASKS["niah_multikey_2"].build("key", 50, 0, len)
    key = draft.answer_prefix.split(" for ")[1].split()[0]
    assert draft.prompt.count(f"numbers for {key} is:") == 1


def test_same_needles_at_every_length(tokenizer: Any) -> None:
    (short,) = testbed.ruler("niah_multiquery", 700, 1, 0, tokenizer)
    (long,) = testbed.ruler("niah_multiquery", 1500, 1, 0, tokenizer)
    assert short.answers == long.answers
    assert short.answer_prefix == long.answer_prefix


def test_score() -> None:
    score = testbed.ruler_score
    assert score(["It is 1234567."], [["1234567"]], "niah_single_1") == 1.0
    assert score(["none"], [["1234567"]], "niah_single_1") == 0.0
    assert score(["A b\x00C"], [["a", "B", "c", "d"]], "niah_multivalue") == 0.75
    assert score(["x", "ab"], [["y"], ["A", "z"]], "vt") == 0.25
    # A control character becomes a line end, so it cannot join two halves.
    assert score(["12\x0034567"], [["1234567"]], "fwe") == 0.0


def test_errors(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="one of niah_single_1, .*fwe; got 'niah'"):
        testbed.ruler("niah", 1024, 1, 0, tokenizer)
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        testbed.ruler("vt", 1024, 0, 0, tokenizer)
    with pytest.raises(ValueError, match=r"cwe needs at least \d+ tokens .*; got 300"):
        testbed.ruler("cwe", 300, 1, 0, tokenizer)
    least = re.search(r"at least (\d+)", str(_error("niah_multikey_3", 100, tokenizer)))
    assert least is not None
    assert len(testbed.ruler("niah_multikey_3", int(least[1]), 1, 0, tokenizer)) == 1
    with pytest.raises(ValueError, match=r"cwe has words for at most \d+ tokens.*; got 500000"):
        testbed.ruler("cwe", 500_000, 1, 0, tokenizer)
    with pytest.raises(ValueError, match="got 'qa_1'"):
        testbed.ruler_score(["a"], [["a"]], "qa_1")
    with pytest.raises(ValueError, match="at least one; got 1 and 2"):
        testbed.ruler_score(["a"], [["a"], ["b"]], "vt")
    with pytest.raises(ValueError, match="got 0 and 0"):
        testbed.ruler_score([], [], "vt")
    with pytest.raises(ValueError, match="sequences of strings; got 'a'"):
        testbed.ruler_score(["a"], ["a"], "vt")


def _error(task: str, tokens: int, tokenizer: Any) -> ValueError:
    with pytest.raises(ValueError) as caught:
        testbed.ruler(task, tokens, 1, 0, tokenizer)
    return caught.value


def test_the_real_model_solves_it(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    (sample,) = testbed.ruler("niah_single_1", 512, 1, 0, tokenizer)
    ids = tokenizer(testbed.ruler_prompt(sample, tokenizer), return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(out[0, sample.tokens :])
    assert testbed.ruler_score([answer], [sample.answers], sample.task) == 1.0

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

testbed = pytest.importorskip("testbed")
pytest.importorskip("typer")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def quality():
    before = list(sys.path)
    taken = sys.modules.pop("shared", None)  # other tools' experiments have one too
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import quality

        yield quality
    finally:
        sys.path[:] = before
        sys.modules.pop("shared", None)
        sys.modules.pop("quality", None)
        sys.modules.pop("peers", None)
        if taken is not None:
            sys.modules["shared"] = taken


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_single_2", "vt", "niah_multivalue"])
def test_a_sample_is_context_question_and_answer(quality, task: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(testbed.smollm2_path())
    [sample] = testbed.ruler(task, 1024, 1, 0, tokenizer)
    context, question, answer = (tokenizer.decode(x) for x in quality.parts(sample, tokenizer))
    assert context + question == testbed.ruler_prompt(sample, tokenizer)
    assert question.startswith(("\nWhat", "\nQuestion:")) and len(question) < 500
    assert question.endswith(sample.answer_prefix)
    assert all(value in context and value in answer for value in sample.answers)


def test_texts_of_tasks_are_none_that_are_measured(quality) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(testbed.smollm2_path())
    shared = sys.modules["shared"]
    assert not set(shared.TASKS) & set(quality.TASKS)
    found = shared.question_texts(tokenizer, 16, 512)
    assert len(found) == 16 and len({e.ids.numpy().tobytes() for e in found}) == 16
    for text in found:
        end = text.ids[len(text.ids) - text.answer :]
        assert 0 < text.query < text.answer < len(text.ids) // 2
        assert text.ids[: text.query].tolist() == end[: text.query].tolist()
    asked = [tokenizer.decode(e.ids[len(e.ids) - e.answer :]) for e in found]
    assert sum(a.startswith(("\nWhat", "\nQuestion")) for a in asked) == 8


@pytest.mark.parametrize("group", ["hidden", "known", "learned", "original", "options"])
def test_only_blocks_that_every_arm_finished_count(quality, group: str) -> None:
    names = quality.arms(group)
    cells = {f"vt | {name} | 0": [1.0, 2.0] for name in names}
    cells |= {f"vt | {name} | 4": [3.0] for name in names[1:]}
    found = quality.gathered(cells, group)
    assert set(found) == {"vt"} and all(v == [1.0, 2.0] for v in found["vt"].values())
    assert "2 samples" in quality.show(group, found)


def test_bootstrap_is_of_pairs(quality) -> None:
    ours = [float(i) for i in range(20)]
    sure = quality.better(ours, [x + 0.1 for x in ours])  # tiny beside the spread of samples
    assert sure["gap"] == pytest.approx(0.1) and sure["low"] > 0 and sure["p"] == 0
    unsure = quality.better(ours, [x + (-1) ** i for i, x in enumerate(ours)])
    assert unsure["low"] < 0 < unsure["high"]


def test_presses_are_compared_on_the_samples_both_have(quality) -> None:
    peers = importlib.import_module("peers")
    arm = next(iter(peers.OURS.values()))
    ours = {f"vt | hidden {arm} {b} | {at}": [1.0, 1.1, 1.2, 1.0] for b in ("0.25", "0.125")
            for at in (0, 4)}  # fmt: skip
    theirs = {"vt | KVzip 0.25 | 0": [0.5, 0.6, 0.7, 0.5], "vt | KVzip 0.125 | 0": [3.0] * 4,
              "vt | Knorm 0.25 | 4": [0.0] * 4}  # fmt: skip
    lines = peers.show(theirs, ours, ["KVzip", "Knorm"]).splitlines()
    assert "| KVzip | 4 | 0.575− | 3.000+ |" in lines
    gaps = [line for line in lines if line.startswith("- KVzip − heads, bounded")]
    assert len(gaps) == 2 and "at 25.0%: -0.500 (" in gaps[0] and "12.5%: +1.925 (" in gaps[1]
    assert not any("Knorm" in line for line in lines)  # a gap at its start
    (first,) = (line for line in lines if line.startswith("| heads, bounded, original places |"))
    assert "| 8 | 1.075 | 1.075 |" in first

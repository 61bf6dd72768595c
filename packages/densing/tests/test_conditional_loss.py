"""Conditional loss against one forward pass at a time, on tiny models of several shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import testbed
from densing import Pair, measure_conditional_loss, read_pairs, runs_table
from densing.conditional_loss import encode

PAIRS = [
    Pair("a", "The capital of France is", " Paris."),
    Pair("b", "2 + 2 =", " 4"),
    Pair(
        "c", "Question: why is the sky blue?\nAnswer:", " Air scatters blue light more, Rayleigh."
    ),
    Pair("d", "", "No prompt at all."),
    Pair("e", "Ein längerer Satz mit Umlauten, damit", " Bytes und Zeichen verschieden sind: äöü."),
]


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201
    import transformers

    return transformers.AutoTokenizer.from_pretrained(testbed.smollm2_path())


def model(arch: str, size: int):  # noqa: ANN201
    return testbed.tiny(arch, vocab_size=size, max_position_embeddings=256)


def one_at_a_time(net, tokenizer, pair: Pair) -> tuple[float, int]:  # noqa: ANN001
    """Cross-entropy by transformers' own labels: prompt masked with -100, no batch, no padding."""
    ids, start, _ = encode(tokenizer, pair)
    labels = [-100] * start + ids[start:]
    out = net(torch.tensor([ids]), labels=torch.tensor([labels]))
    count = len(ids) - start
    return float(out.loss) * count, count


@pytest.mark.parametrize("arch", ["llama-gqa3", "minicpm4"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_labels_one_pair_at_a_time(tokenizer, arch: str, batch_size: int) -> None:  # noqa: ANN001
    net = model(arch, len(tokenizer))
    found = measure_conditional_loss(net, tokenizer, PAIRS, batch_size=batch_size)
    with torch.inference_mode():
        each = [one_at_a_time(net, tokenizer, p) for p in PAIRS]
    assert found.nats == pytest.approx(sum(nats for nats, _ in each), rel=1e-5)
    assert found.tokens == sum(count for _, count in each)
    assert found.bytes == sum(len(p.answer.encode()) for p in PAIRS)
    assert found.per_byte == pytest.approx(found.nats / found.bytes)
    assert found.per_token == pytest.approx(found.nats / found.tokens)
    assert (found.items, found.excluded, found.truncated) == (5, {}, 0)


def test_only_the_answer_counts(tokenizer) -> None:  # noqa: ANN001
    ids, start, straddles = encode(tokenizer, PAIRS[0])
    assert tokenizer.decode(ids[start:]) == " Paris." and not straddles
    # A boundary inside a word: the tokens that run across count to the answer, and it is said.
    _, _, across = encode(tokenizer, Pair("x", "inter", "national"))
    assert across


def test_long_prompts_lose_their_beginning_and_long_answers_are_named(tokenizer) -> None:  # noqa: ANN001
    net = model("llama-gqa3", len(tokenizer))
    long = [Pair("p", "word " * 400, " end"), Pair("q", "short", " word" * 400), *PAIRS]
    found = measure_conditional_loss(net, tokenizer, long, max_length=64)
    assert found.truncated == 1 and set(found.excluded) == {"q"} and found.items == 6
    with pytest.raises(ValueError, match="no answer fits a context of 8"):
        measure_conditional_loss(net, tokenizer, long[1:2], max_length=8)


def test_a_killed_run_goes_on(tokenizer, tmp_path: Path) -> None:  # noqa: ANN001
    net = model("llama-gqa3", len(tokenizer))
    whole = measure_conditional_loss(net, tokenizer, PAIRS, batch_size=2, out=tmp_path / "whole")
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done >= 2:
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        measure_conditional_loss(net, tokenizer, PAIRS, batch_size=2, out=out, progress=stop)
    with out.open("a") as stream:
        stream.write('{"id": "e", "na')  # what a kill in the middle of a write leaves
    seen: list[int] = []
    again = measure_conditional_loss(
        net, tokenizer, PAIRS, batch_size=2, out=out, progress=lambda done, total: seen.append(done)
    )
    assert seen[0] == 4 and seen[-1] == 5  # the first two were not measured again
    assert again == whole
    assert len(out.read_text().splitlines()) == 6
    with pytest.raises(ValueError, match="holds losses of other pairs"):
        measure_conditional_loss(net, tokenizer, PAIRS[:2], out=out)


def test_a_ladder_refuses_losses_that_cannot_be_compared(tokenizer) -> None:  # noqa: ANN001
    net = model("llama-gqa3", len(tokenizer))
    one = measure_conditional_loss(net, tokenizer, PAIRS)
    other = measure_conditional_loss(net, tokenizer, PAIRS[:2])
    table = runs_table([(1e6, 1e8, one), (2e6, 1e8, one)])
    assert table["loss"] == [one.per_byte] * 2 and table["parameters"] == [1e6, 2e6]
    with pytest.raises(ValueError, match="different pairs"):
        runs_table([(1e6, 1e8, one), (2e6, 1e8, other)])
    stranger = type(one)(**{**one.__dict__, "tokenizer": "another"})
    with pytest.raises(ValueError, match="different tokenizers"):
        runs_table([(1e6, 1e8, one), (2e6, 1e8, stranger)], unit="per_token")
    assert runs_table([(1e6, 1e8, one), (2e6, 1e8, stranger)])["loss"]


def test_pairs_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n\n{"id": 7, "prompt": "", "answer": "c"}\n')
    assert read_pairs(file) == [Pair("1", "a", "b"), Pair("7", "", "c")]
    for line, message in (
        ('{"prompt": "a"}', "2: expected a JSON object with 'prompt' and 'answer'"),
        ("not json", "2: expected a JSON object"),
        ('{"prompt": "a", "answer": ""}', "2: prompt and answer must be text"),
        ('{"id": 1, "prompt": "a", "answer": "b"}', "2: the id '1' stands twice"),
    ):
        file.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            read_pairs(file)
    file.write_text("")
    with pytest.raises(ValueError, match="has no pairs"):
        read_pairs(file)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "gone.jsonl")
    json.dumps(PAIRS[0].__dict__)

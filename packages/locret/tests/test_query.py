"""Locret-Q: heads that know what will be asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import LocretConfig, RetainingHeads, importance, prefill, query_first  # noqa: E402
from locret.data import asked, examples, read_texts  # noqa: E402
from locret.evaluate import overlaps  # noqa: E402
from locret.interface import exchanged  # noqa: E402
from locret.labels import collect  # noqa: E402
from locret.training import Example, TrainConfig, train  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return testbed.tiny("llama-gqa3")


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(seed))


class Words:
    """A tokenizer: one id for each word, its length."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_the_question_stands_first_and_again_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join("a" * (1 + i % 9) for i in range(24)))
    [window] = examples(
        read_texts(tmp_path), Words(), length=24, answer=8, query_aware=True
    )  # a quarter of the answer
    plain = torch.tensor([1 + i % 9 for i in range(24)])
    assert window.query == 2 and window.answer == 8
    assert window.ids.tolist() == [*plain[16:18].tolist(), *plain.tolist()]
    line = '{"prompt": "a bb ccc", "question": "dddd eeeee", "answer": "x"}'
    (tmp_path / "b.jsonl").write_text(line)
    (tmp_path / "a.txt").unlink()
    [known] = examples(read_texts(tmp_path), Words(), length=24, answer=8, query_aware=True)
    assert known.ids.tolist() == [4, 5, 1, 2, 3, 4, 5, 1]
    assert (known.answer, known.query) == (3, 2)
    [hidden] = examples(read_texts(tmp_path), Words(), length=24, answer=8)
    assert hidden.ids.tolist() == [1, 2, 3, 4, 5, 1]
    assert (hidden.answer, hidden.query) == (1, 0)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "answer": "x"}')
    with pytest.raises(ValueError, match="prompt, question and answer"):
        examples(read_texts(tmp_path), Words(), length=24, answer=8, query_aware=True)


@pytest.mark.parametrize("input", ["hidden", "qkv"])
def test_labels_are_of_the_context_alone(model, input: str) -> None:
    """Against the definition, on the activations of a whole forward pass."""
    text = asked(tokens(40), 9, 4)
    assert len(text.ids) == 44 and (text.answer, text.query) == (9, 4)
    calls, found = {}, []

    def attend(call):
        calls[call.layer] = call
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, enable_gqa=True
        )

    with torch.no_grad(), exchanged(model, attend):
        model(input_ids=text.ids[None], use_cache=False)
    collect(
        model, text.ids[None], text.answer, lambda layer, x, y: found.append((x, y)),
        input=input, query=text.query,
    )  # fmt: skip
    for layer, (x, y) in enumerate(found):
        call = calls[layer]
        assert (y - importance(call.q[:, :, 35:], call.k[:, :, 4:35])).abs().max() < 1e-5
        assert x.shape[1] == 31
        if input == "hidden":
            assert torch.allclose(x, call.hidden[:, 4:35].float(), atol=1e-5)
    with pytest.raises(ValueError, match="leaves 0 to label"):
        collect(model, text.ids[None], 40, lambda *_: None, query=4)


def test_heads_learn_what_the_question_tells(tmp_path: Path) -> None:
    """Texts end with one of two tokens, many times. In layer 1 the question has been read: its
    heads rank better with the question in front than without.
    """
    model = testbed.tiny("llama-gqa3", rope_parameters={"rope_type": "default", "rope_theta": 1e30})
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([7, 99])
    texts = [
        torch.cat([torch.randint(5, 250, (48,), generator=generator), ends[i % 2].expand(24)])
        for i in range(120)
    ]
    found = {}
    for name, make in (
        ("known", lambda ids: asked(ids, 24, 24)),
        ("hidden", lambda ids: Example(ids, 24)),
    ):
        config = TrainConfig(hidden=32, epochs=10, held_out=0.2, input="hidden")
        some = [make(ids) for ids in texts]
        heads, facts = train(model, some, config, tmp_path / name)
        assert heads.config.query_aware == (name == "known")
        assert facts["tokens"] == 96 * 48
        found[name] = facts["overlap"]["mlp"]
        again = overlaps(model, {"heads": heads}, some[96:])["heads"]
        assert again == pytest.approx(found[name], abs=0.02)
    assert found["known"] > found["hidden"] + 0.02
    heads.save(tmp_path / "saved")
    assert not RetainingHeads.load(tmp_path / "saved").config.query_aware
    with pytest.raises(ValueError, match="with and without a query do not mix"):
        train(model, [asked(texts[0], 1, 1), Example(texts[1], 1)], config, tmp_path / "x")


@torch.no_grad()
def test_the_question_is_never_evicted(model) -> None:
    question, context = tokens(6, 1)[None], tokens(80, 2)[None]
    config = LocretConfig(budget=16, chunk=8, stabilisers=4, sinks=2, local=0)
    ids, sizes = query_first(question, context, config)
    assert ids.shape == (1, 86) and torch.equal(ids[:, :6], question)
    for layer in prefill(model, "keynorm", ids, sizes).kept():
        assert (layer[..., :6] == torch.arange(6)).all() and layer.shape[2] == 16
    with pytest.raises(ValueError, match="does not hold stabilisers 4"):
        query_first(tokens(13)[None], context, config)

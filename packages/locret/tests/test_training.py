from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret.data import examples, read_texts  # noqa: E402
from locret.ridge import RidgeSums  # noqa: E402
from locret.training import Example, TrainConfig, train  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return testbed.tiny("llama-gqa3")


@pytest.fixture(scope="module")
def texts() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [Example(torch.randint(5, 250, (64,), generator=generator), 8) for _ in range(10)]


CONFIG = TrainConfig(hidden=8, epochs=2, held_out=0.2)


def same(a, b) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_ridge_is_the_closed_form() -> None:
    """Of what differs within a text: each has its own offset, which would mislead otherwise."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 5)) * [1, 10, 0.1, 1, 3] + [0, 5, 1, 0, 0]
    texts = np.array_split(np.arange(300), 7)
    for part in texts:
        x[part] += generator.normal(size=5) * [1, 10, 0.1, 1, 3]
    y = x @ generator.normal(size=(5, 2)) + 2 + 0.1 * generator.normal(size=(300, 2))
    for part in texts:
        y[part] += 5 * generator.normal(size=2)
    sums = RidgeSums(5, 2)
    for part in texts:
        sums.add(torch.tensor(x[part])[None], torch.tensor(y[part].T)[None])
    weights, intercepts = sums.solve(0.05)
    inner, outer = (np.concatenate([a[p] - a[p].mean(0) for p in texts]) for a in (x, y))
    scale = inner.std(0)
    z = inner / scale
    expected = np.linalg.solve(z.T @ z / 300 + 0.05 * np.eye(5), z.T @ outer / 300)
    predicted = (x - x.mean(0)) / scale @ expected + y.mean(0)
    assert np.abs(x @ weights.numpy().T + intercepts.numpy() - predicted).max() < 1e-4
    with pytest.raises(ValueError, match="has seen no token"):
        RidgeSums(5, 2).solve()


def test_an_input_that_never_varies_gets_no_weight() -> None:
    sums = RidgeSums(2, 1)
    x = torch.stack([torch.randn(50), torch.full((50,), 3.0)], -1)[None]
    sums.add(x, x[..., 0][:, None])
    weights, _ = sums.solve(1e-6)
    assert weights[0, 1] == 0 and weights[0, 0] == pytest.approx(1, abs=1e-3)


def test_only_heads_change_and_the_seed_decides(model, texts, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    heads, facts = train(model, texts, CONFIG, tmp_path / "a")
    again, _ = train(model, texts, CONFIG, tmp_path / "b")
    assert same(heads, again)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert facts["texts"] == 8 and facts["tokens"] == 8 * 56
    other, _ = train(model, texts, TrainConfig(hidden=8, epochs=2, held_out=0.2, seed=1),
                     tmp_path / "a")  # fmt: skip
    assert not same(heads, other)  # and the labels of the folder served again


def test_training_goes_on_after_a_kill(model, texts, tmp_path: Path) -> None:
    whole, _ = train(model, texts, CONFIG, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(text: str, done: float) -> None:
        if text == "labels of text 4 of 10" or text == "head of layer 1":
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            train(model, texts, CONFIG, tmp_path / "cut", kill)
        kept = sorted(p.name for p in (tmp_path / "cut").glob("*.safetensors"))
        assert kept == [f"labels-{i:05d}.safetensors" for i in range(3)]
    lines: list[str] = []
    resumed, _ = train(model, texts, CONFIG, tmp_path / "cut", lambda t, d: lines.append(t))
    assert same(whole, resumed)
    (tmp_path / "cut" / "head-001.safetensors").unlink()
    again, _ = train(model, texts, CONFIG, tmp_path / "cut")
    assert same(whole, again)


def test_heads_rank_unseen_text(tmp_path: Path) -> None:
    """All texts end with one token, and nothing turns with position but a head's first pair: what
    the end looks at can be foreseen from a key alone.
    """
    model = testbed.tiny("llama-gqa3", rope_parameters={"rope_type": "default", "rope_theta": 1e30})
    generator = torch.Generator().manual_seed(1)
    end = torch.randint(5, 250, (1,), generator=generator)
    texts = [
        Example(torch.cat([torch.randint(5, 250, (63,), generator=generator), end]), 1)
        for _ in range(100)
    ]
    config = TrainConfig(hidden=32, epochs=10, held_out=0.2, lr=3e-3, labels="scores")
    _, facts = train(model, texts, config, tmp_path)
    assert facts["overlap"]["ridge"] > 0.4  # by chance: 0.1
    assert facts["overlap"]["mlp"] > facts["overlap"]["ridge"]


def test_a_folder_of_another_training_is_refused(model, texts, tmp_path: Path) -> None:
    train(model, texts, TrainConfig(hidden=0), tmp_path)
    with pytest.raises(ValueError, match="labels of another model"):
        train(model, texts[:5], TrainConfig(hidden=0), tmp_path)
    with pytest.raises(ValueError, match="at least two texts"):
        train(model, texts[:1], TrainConfig(hidden=0), tmp_path)
    with pytest.raises(ValueError, match="held_out must lie between"):
        TrainConfig(held_out=1)
    with pytest.raises(ValueError, match="epochs ≥ 1"):
        TrainConfig(epochs=0)


class Words:
    """A tokenizer: one id for each word."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_windows_come_from_all_documents_in_turn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a " * 25)
    (tmp_path / "b.jsonl").write_text(
        '{"text": "' + "bb " * 12 + '"}\n\n{"prompt": "ccc ccc", "answer": "d"}\n'
    )
    found = examples(read_texts(tmp_path), Words(), length=10, answer=3)
    assert [(e.ids[0].item(), len(e.ids), e.answer) for e in found] == [
        (1, 10, 3), (2, 10, 3), (3, 3, 1), (1, 10, 3)
    ]  # fmt: skip
    assert len(examples(read_texts(tmp_path), Words(), length=10, answer=3, count=2)) == 2


def test_of_a_long_prompt_the_middle_goes() -> None:
    [found] = examples([("a bb ccc dddd", "eeeee", "x")], Words(), length=4, answer=1)
    assert found.ids.tolist() == [1, 4, 5, 1]


def test_bad_data_says_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_texts(tmp_path / "no"))
    with pytest.raises(ValueError, match="holds no .txt or .jsonl"):
        list(read_texts(tmp_path))
    for line, message in (("{", "is not JSON"), ("[1]", "neither")):
        (tmp_path / "x.jsonl").write_text(line)
        with pytest.raises(ValueError, match=f"x.jsonl:1 .*{message}"):
            list(read_texts(tmp_path))
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match="expected .txt or .jsonl, got '.csv'"):
        list(read_texts(tmp_path / "x.csv"))
    with pytest.raises(ValueError, match="no text has 10 tokens"):
        examples(["a b"], Words(), length=10, answer=3)
    with pytest.raises(ValueError, match="answer must lie between"):
        examples(["a b"], Words(), length=10, answer=10)

"""Verification must find a pool that helps, one that hurts, and call noise noise."""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from ultraclean import ClassifierConfig, Recipe, loop, make_base, verification, verify
from ultraclean.proxy_model import Packed, bits_per_byte, load, pack
from ultraclean.verification import Gain, student_quantile

SIZES = {"width": 32, "layers": 1, "vocab_size": 600, "length": 64}
RECIPE = Recipe(tokens=40_000, batch=16, length=64, seeds=3, eval_windows=30, lr=3e-3)


@pytest.fixture(scope="module")
def texts(prose: list[str], shuffled: list[str]) -> dict[str, list[str]]:
    """A default mix of both kinds; evaluations are of the good kind."""
    draw = random.Random(0)
    return {
        "mix": prose[:100] + shuffled[:300],
        "good": prose[100:500],
        "bad": ["".join(draw.choices(string.printable, k=400)) for _ in range(50)],
        "same": shuffled[300:380] + prose[500:525],
        "held out": prose[525:],
    }


@pytest.fixture(scope="module")
def base(texts: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    return make_base(texts["mix"], folder, tokens=60_000, **SIZES)


def test_finds_what_helps_and_what_hurts(texts: dict, base: Path, tmp_path: Path) -> None:
    found = verify(
        base, {"good": texts["good"], "bad": texts["bad"]}, texts["mix"],
        {"a": texts["held out"][:60], "b": texts["held out"][60:]}, RECIPE, tmp_path / "v",
    )  # fmt: skip
    assert found.accepted == ["good"]
    assert found.of("good").verdict == "helps" and found.of("bad").verdict == "hurts"
    for pool in ("good", "bad"):
        a, b, mean = (found.of(pool, e) for e in ("a", "b", "mean"))
        assert mean.gain == pytest.approx((a.gain + b.gain) / 2)
    control, good = found.losses["control"]["a"], found.losses["good"]["a"]
    paired = np.array(control) - np.array(good)
    assert found.of("good", "a").gain == pytest.approx(paired.mean())
    assert found.of("good", "a").error == pytest.approx(paired.std(ddof=1) / math.sqrt(3))
    ledger = found.ledger
    assert ledger["tokens_trained"] == 9 * (40_000 // 1024) * 1024
    assert ledger["flops"] == ledger["weights"] * (
        6 * ledger["tokens_trained"] + 2 * ledger["tokens_measured"]
    )
    assert ledger["base_tokens"] == 60_000 // 1024 * 1024
    assert "within noise" in Gain("p", "e", 0.1, 0.1, 0.3).verdict


def test_the_default_mix_itself_is_within_noise_more_often_than_not(
    texts: dict, base: Path, tmp_path: Path
) -> None:
    """The same text as the control's, other windows: by construction there is nothing to find."""
    pools = {f"same{i}": texts["mix"][i::2] for i in range(2)}
    few = Recipe(tokens=8_000, length=64, seeds=4, eval_windows=20)
    found = verify(base, pools, texts["mix"], {"e": texts["held out"]}, few, tmp_path / "v")
    assert all(abs(found.of(p).gain) < 0.05 for p in pools)
    assert any(found.of(p).verdict == "within noise" for p in pools)


def test_goes_on_after_a_kill_with_the_same_result(
    texts: dict, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (base, {"good": texts["good"]}, texts["mix"], {"e": texts["held out"]},
                 Recipe(tokens=3_000, length=64, seeds=2, eval_windows=10))  # fmt: skip
    whole = verify(*arguments, tmp_path / "whole")
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return anneal(*args, **kwargs)

    anneal = verification._anneal
    monkeypatch.setattr(verification, "_anneal", killed)
    with pytest.raises(KeyboardInterrupt):
        verify(*arguments, tmp_path / "killed")
    again = verify(*arguments, tmp_path / "killed")
    assert len(calls) == 3 + 2 and again == whole
    assert json.loads((tmp_path / "killed/verification.json").read_text())["accepted"] is not None


def test_loss_is_that_of_the_definition(base: Path, texts: dict) -> None:
    import torch

    model, tokenizer = load(base)
    packed = pack(texts["held out"][:3], tokenizer)
    assert packed.bytes == sum(len(t.encode()) for t in texts["held out"][:3])
    length = 50
    total, n = 0.0, (len(packed.tokens) - 1) // length
    for i in range(n):
        ids = torch.tensor(packed.tokens[i * length : (i + 1) * length + 1])[None]
        with torch.no_grad():
            logs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        total -= float(logs[0, torch.arange(length), ids[0, 1:]].sum())
    expected = total / (n * length) / math.log(2) * len(packed.tokens) / packed.bytes
    assert bits_per_byte(model, packed, length, 4, 1000) == pytest.approx(expected, rel=1e-5)
    assert packed.window(len(packed.tokens) - 1, 2).tolist() == [
        packed.tokens[-1], *packed.tokens[:2]
    ]  # fmt: skip
    assert isinstance(packed, Packed)


@pytest.mark.parametrize(
    ("confidence", "freedom", "value"),
    [(0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 4, 2.132), (0.975, 10, 2.228), (0.99, 30, 2.457)],
)
def test_student_quantile(confidence: float, freedom: int, value: float) -> None:
    """Against printed tables."""
    assert student_quantile(confidence, freedom) == pytest.approx(value, abs=2e-3)


def test_loop(texts: dict, base: Path, tmp_path: Path) -> None:
    config = ClassifierConfig(dim=8, bucket=5_000, min_count=2, lr=0.5, epochs=10)
    sample = texts["same"] + texts["good"][:200]
    arguments = (base, {"good": texts["good"][200:], "bad": texts["bad"]}, texts["mix"][100:],
                 sample, texts["mix"], {"e": texts["held out"]}, tmp_path / "loop")  # fmt: skip
    settings = {"config": config, "recipe": Recipe(tokens=20_000, length=64, eval_windows=20),
                "most_rounds": 2}  # fmt: skip
    report = loop(*arguments, **settings)
    assert report.accepted == ["good"]
    assert report.rounds[0].verdict == "helps" and report.best is not None
    if len(report.rounds) == 2:
        assert report.rounds[1].positives > report.rounds[0].positives
    assert report.stopped
    assert loop(*arguments, **settings) == report


def test_errors(texts: dict, base: Path, tmp_path: Path) -> None:
    evals = {"e": texts["held out"]}
    for pools, judges, message in (
        ({}, evals, "at least one pool"),
        ({"control": ["x"]}, evals, "none 'control'"),
        ({"p": ["x"]}, {"mean": ["x"]}, "none 'mean'"),
        ({"p": [" "]}, evals, "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(base, pools, texts["mix"], judges, RECIPE, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        verify(tmp_path, {"p": ["x"]}, texts["mix"], evals, RECIPE, tmp_path)
    for bad in ({"candidate": 0}, {"seeds": 1}, {"confidence": 1}, {"tokens": 0}):
        with pytest.raises(ValueError, match="must be"):
            Recipe(**bad)

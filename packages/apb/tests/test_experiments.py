from __future__ import annotations

import importlib.util
from pathlib import Path

import testbed

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bootstrap_knows_a_difference_from_none() -> None:
    bootstrap = load("quality").bootstrap
    assert bootstrap([0.1, 0.2, 0.15, 0.12] * 8, draws=500) < 0.01
    assert 0.2 < bootstrap([0.1, -0.1, 0.2, -0.2] * 8, draws=500) < 0.8
    assert bootstrap([-0.1, -0.2] * 8, draws=500) == 1.0


def test_every_arm_is_scored_against_full() -> None:
    quality = load("quality")
    model, tokenizer = testbed.smollm2()
    [sample] = testbed.ruler("niah_single_1", 300, 1, 0, tokenizer)
    found = quality.score(model, tokenizer, sample, 3)
    assert found.keys() == quality.ARMS.keys()
    assert found["full"]["kl"] == 0 and found["full"]["nll"] < 1
    assert all(arm["kl"] > -1e-6 for arm in found.values())
    for arm in ("apb", "star", "anchor only"):
        assert found["nothing"]["rows"] < found[arm]["rows"]
    assert found["nothing"]["kl"] > 1e-4

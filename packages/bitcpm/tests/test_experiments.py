from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bitcpm import TwoStage
from bitcpm.train import Blocks

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"bitcpm_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return load("recipe")


def test_differences_are_paired_over_seeds(recipe):
    mean, error = recipe.against({0: 1.0, 1: 2.5, 7: 9.0}, {0: 0.5, 1: 1.0, 2: 3.0})
    assert mean == pytest.approx(1.0)
    assert error == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert math.isnan(recipe.against({0: 1.0}, {0: 1.0})[1])


def test_arms_differ_where_their_names_say(recipe):
    settings = recipe.Settings()
    base = recipe.ARMS[recipe.BASE].two_stage(settings)
    for name, arm in recipe.ARMS.items():
        schedule = TwoStage(settings.steps, arm.two_stage(settings))
        assert schedule.switch_step == settings.steps - round(arm.share * settings.steps)
        changed = arm.two_stage(settings) != base
        assert changed == name.startswith(("QAT", "no re-warm-up")), name
        if arm.distillation is not None:
            assert arm.distillation.begin * settings.steps >= schedule.switch_step
    assert {n for group in recipe.GROUPS.values() for n in group} == {
        recipe.FULL, recipe.CUT, *recipe.ARMS,
    }  # fmt: skip


def test_a_run_goes_on_from_its_results(recipe, tmp_path, monkeypatch):
    settings = recipe.Settings(vocabulary=300, block=16, batch=2, steps=10, held_out=4)
    torch.manual_seed(0)
    text = Blocks.__new__(Blocks)
    text.blocks = torch.randint(0, 300, (64, 16))
    arms = {n: recipe.ARMS[n] for n in (recipe.BASE, "teacher at the end")}
    monkeypatch.setattr(recipe, "ARMS", arms)
    losses = {
        name: recipe.measured(name, settings, 0, text, text, tmp_path)
        for name in (recipe.FULL, recipe.CUT, *arms)
    }
    assert len({round(x, 6) for x in losses.values()}) == 4
    assert losses[recipe.CUT] > losses[recipe.FULL]
    again = recipe.measured(recipe.BASE, settings, 0, text, text, tmp_path)
    assert again == losses[recipe.BASE]
    line = {"arm": "x", "seed": 0, "loss": 1.0, "settings": recipe.dataclasses.asdict(settings)}
    (tmp_path / "out.jsonl").write_text(json.dumps(line) + "\n")
    assert recipe.read(tmp_path / "out.jsonl", settings) == {"x": {0: 1.0}}
    assert recipe.read(tmp_path / "out.jsonl", recipe.Settings()) == {}

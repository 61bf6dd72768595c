"""Every experiment's smoke run: it ends, writes what it says, and does no finished work again."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infllm2 import InfLLMv2Config, select_blocks

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# What each needs beyond testbed, and whether it draws a figure.
SCRIPTS = {
    "selection_lse": ((), False),
    "ruler": (("matplotlib",), True),
    "finetune": (("minicpm4",), False),
    "train_minicpm4": (("minicpm4", "matplotlib"), True),
}


def call(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--quick", "--out", str(folder)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*command, *more], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_run(name: str, tmp_path: Path) -> None:
    needed, draws = SCRIPTS[name]
    for module in ("testbed", "transformers", *needed):
        pytest.importorskip(module)
    done = call(name, tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "results" / f"{name}.json"
    result = json.loads(path.read_text("utf-8"))
    assert result["summary"] and result["settings"] and result["env"]["torch"]
    assert (tmp_path / "figures" / f"{name}.png").exists() == draws

    dropped = list(result["cells"])[-1]
    del result["cells"][dropped]
    path.write_text(json.dumps(result))
    again = call(name, tmp_path)
    assert again.returncode == 0, again.stderr
    lines = [line for line in again.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 1 and dropped in lines[0]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.delitem(sys.modules, "shared", raising=False)
    return importlib.import_module("shared")


def test_cells_go_on_where_a_run_stopped(
    shared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    computed: list[str] = []

    def cell(name: str, fails: bool = False) -> tuple[str, Callable[[], str]]:
        def compute() -> str:
            if fails:
                raise shared.Later
            computed.append(name)
            return name.upper()

        return name, compute

    sizes = {"lengths": {1: 2}}
    late = shared.Cells("some", tmp_path, sizes, minutes=0)
    assert not late.fill([cell("a")]) and not computed
    first = shared.Cells("some", tmp_path, sizes)
    assert not first.fill([cell("a"), cell("b", fails=True), cell("c")])
    assert "b is not finished: run the same command again" in capsys.readouterr().out
    second = shared.Cells("some", tmp_path, sizes)
    assert second.fill([cell("a"), cell("b"), cell("c")])
    assert computed == ["a", "b", "c"]
    assert second.cells == {"a": "A", "b": "B", "c": "C"}
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["some.json"]
    with pytest.raises(ValueError, match="other settings"):
        shared.Cells("some", tmp_path, {"lengths": {1: 3}})


def test_random_blocks_differ_from_the_chosen_in_the_choice_alone(shared: Any) -> None:
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=-1
    )
    q, k = torch.randn(1, 6, 300, 16), torch.randn(1, 2, 300, 16)
    for queries in (300, 33, 1):
        chosen = select_blocks(q[:, :, -queries:], k, config)
        drawn = shared.random_blocks(0)(q[:, :, -queries:], k, config)
        assert drawn.shape == chosen.shape and drawn.dtype == chosen.dtype
        assert torch.equal((drawn >= 0).sum(-1), (chosen >= 0).sum(-1))
        own = torch.arange(300 - queries, 300)[:, None] // 16
        for forced in (torch.zeros_like(own), own, (own - 1).clamp(min=0)):
            assert (drawn == forced).any(-1).all()
        assert (drawn <= own).all()
        left, right = drawn[..., :-1], drawn[..., 1:]
        assert ((left < right) | (right == -1)).all()
    all_drawn = shared.random_blocks(0)(q, k, config)
    again = shared.random_blocks(0)(q, k, config)
    assert torch.equal(all_drawn, again)
    late = all_drawn[:, :, 200:]
    # Blocks 1 … 9 are free for all of these queries, 4 − 1 of them are drawn: all alike often.
    counts = torch.bincount(late[late > 0].flatten(), minlength=10)[1:10].float()
    assert counts.min() > 0.5 * counts.max()
    window = shared.window_alone(config)
    assert window.budget == config.budget and window.topk == window.init_blocks

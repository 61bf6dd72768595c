"""Processes that train an arm together must find what one finds, and write as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ultraclean import make_base, zero_config
from ultraclean.processes import Alone, launched
from ultraclean.proxy_model import load, train

pytestmark = pytest.mark.slow
SEEDS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def data(prose: list[str], shuffled: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the command, and a base made by one process."""
    folder = tmp_path_factory.mktemp("data")
    parts = {"mix": prose[:100] + shuffled[:300], "good": prose[100:500], "judge": prose[525:]}
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    make_base(parts["mix"], folder / "base", tokens=30_000, width=32, layers=1, vocab_size=600,
              length=LENGTH)  # fmt: skip
    return folder


def command(data: Path, output: Path, *more: str, base: bool = True) -> list[str]:
    """`ultraclean verify` by its module's name."""
    return [
        "-m", "ultraclean.cli", "verify", "--pool", f"good={data}/good.jsonl", "--default",
        f"{data}/mix.jsonl", "--evaluation", f"e={data}/judge.jsonl", "-o", str(output),
        "--tokens", "20000", "--seeds", str(SEEDS), "--length", str(LENGTH),
        *(["--base", f"{data}/base"] if base else ["--base-tokens", "8000"]), "--json", *more,
    ]  # fmt: skip


def run(words: list[str], processes: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it, by torchrun where there are several processes."""
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True,
                          env=environment)  # fmt: skip


def losses(folder: Path) -> np.ndarray:
    """[arms, seeds]."""
    found = json.loads((folder / "verification.json").read_text())["losses"]
    return np.array([found[arm]["e"] for arm in ("control", "good")])


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done = run(command(data, folder), 1)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_two_processes_find_what_one_finds(data: Path, alone: Path, tmp_path: Path) -> None:
    done = run(command(data, tmp_path / "two"), 2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(alone), losses(tmp_path / "two")
    # Other windows, as another seed draws them, move a loss by thousands of times this.
    assert np.abs(one - two).max() < 1e-5
    assert np.abs(one[:, 0] - one[:, 1]).min() > 1e-2
    assert not np.array_equal(one, two), "sums in one order: did each process train alone?"
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 1
    whole = json.loads((alone / "verification.json").read_text())
    for ours, theirs in zip(printed[0]["gains"], whole["gains"], strict=True):
        assert ours["verdict"] == theirs["verdict"]
        assert ours["gain"] == pytest.approx(theirs["gain"], abs=2e-5)
    written = sorted(p.name for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert written == sorted(p.name for p in alone.rglob("*") if p.is_file())


def test_goes_on_with_another_number_of_processes(data: Path, alone: Path, tmp_path: Path) -> None:
    cells = tmp_path / "go" / "cells"
    cells.mkdir(parents=True)
    kept = sorted((alone / "cells").iterdir())[::2]
    for cell in kept:
        os.link(cell, cells / cell.name)
    done = run(command(data, tmp_path / "go", "--micro", "2"), 2)  # four passes in a step
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(losses(alone) - losses(tmp_path / "go")).max() < 1e-5
    for cell in kept:  # not measured again
        assert (cells / cell.name).samefile(cell)


def test_a_base_is_made_together_and_a_batch_is_shared_evenly(data: Path, tmp_path: Path) -> None:
    done = run(command(data, tmp_path / "made", base=False), 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "made/base/base.json").read_text())["tokens"] == 7 * 16 * LENGTH
    uneven = run(command(data, tmp_path / "uneven", "--batch", "15"), 2)
    assert uneven.returncode != 0
    assert "batch (15 windows) must be a multiple of the number of processes (2)" in uneven.stderr


def test_a_loop_of_two_processes_is_that_of_one(data: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = [
            "-m", "ultraclean.cli", "loop", "--pool", f"good={data}/good.jsonl", "--negatives",
            f"{data}/mix.jsonl", "--sample", f"{data}/good.jsonl", "--default",
            f"{data}/mix.jsonl", "--evaluation", f"e={data}/judge.jsonl", "--base",
            f"{data}/base", "--tokens", "4000", "--seeds", "2", "--dim", "8", "--bucket", "5000",
            "--min-count", "2", "--classifier-lr", "0.5", "--rounds", "1", "-o", str(out),
        ]  # fmt: skip
        done = run(words, processes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("round 1: ") == 1
        found.append(json.loads((out / "loop.json").read_text())["rounds"][0])
    assert found[0]["kept"] == found[1]["kept"] > 0
    assert found[0]["threshold"] == found[1]["threshold"]
    assert found[0]["gain"] == pytest.approx(found[1]["gain"], abs=2e-5)


def test_passes_of_a_few_windows_sum_to_the_batch(data: Path) -> None:
    import torch

    def trained(micro: int) -> list:
        model, _ = load(data / "base")

        def batches(step: int) -> np.ndarray:
            return np.random.default_rng(step).integers(0, 600, (12, 17))

        train(model, batches, lambda step: 1e-3, 3, micro, Alone())
        return [p.detach() for p in model.parameters()]

    whole = trained(0)
    for micro in (1, 5):  # 5: passes of 4, since 12 is no multiple of 5
        for a, b in zip(whole, trained(micro), strict=True):
            assert torch.allclose(a, b, atol=2e-4)
            assert micro == 5 or not torch.equal(a, torch.zeros_like(a))


def test_shares_are_the_whole() -> None:
    rows = np.arange(10)
    processes = Alone()
    assert processes.share(rows).tolist() == rows.tolist()
    processes.count = 3
    parts = []
    for rank in range(3):
        processes.rank = rank
        parts += processes.share(rows).tolist()
    assert sorted(parts) == rows.tolist()
    assert type(launched()) is Alone


def test_deepspeed_is_asked_for_by_name(data: Path, tmp_path: Path) -> None:
    """Where it is missing there is one clear line; where it is there, it must run."""
    config = json.loads(zero_config().read_text())
    assert config["zero_optimization"]["stage"] == 2
    done = run(command(data, tmp_path), 2, ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu",
               ACCELERATE_DEEPSPEED_CONFIG_FILE=str(zero_config()))  # fmt: skip
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        assert done.returncode != 0
        assert "deepspeed where you asked for it" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]

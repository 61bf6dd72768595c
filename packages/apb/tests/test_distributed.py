"""Real processes over gloo do what virtual hosts do, bit for bit where it counts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import apb

sys.path.insert(0, str(Path(__file__).parent))
from apb_worker import SIZES, STRATEGIES, run

WORKER = Path(__file__).parent / "apb_worker.py"


def launch(
    hosts: int, *arguments: str, torchrun: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(hosts), *torchrun, str(WORKER), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all numbers of hosts, from one start of the processes: importing takes longest."""
    folder = tmp_path_factory.mktemp("gloo")
    done = launch(max(SIZES), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("hosts", SIZES)
def test_gloo_is_virtual(hosts: int, gloo: Path) -> None:
    real = [torch.load(gloo / f"{hosts}.{rank}.pt") for rank in range(hosts)]
    for strategy in STRATEGIES:
        expected = run(hosts, strategy)
        for rank, found in enumerate(real):
            got = found[strategy]
            torch.testing.assert_close(got["logits"], expected["logits"], rtol=0, atol=1e-6)
            assert torch.equal(got["greedy"], expected["greedy"])
            assert torch.equal(got["sampled"], expected["sampled"])
            assert got["bytes"] == {rank: expected["bytes"][rank]}


def test_a_host_that_dies_is_reported_in_bounded_time(tmp_path: Path) -> None:
    """Without torchrun, whose agent would end the survivors before they can speak."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    began = time.monotonic()
    hosts = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), "die"],
            env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(3)
    ]
    codes = [host.wait(timeout=120) for host in hosts]
    assert codes == [0, 0, 17] and time.monotonic() - began < 110
    for rank in (0, 1):
        error = (tmp_path / f"error{rank}.txt").read_text("utf-8")
        assert f"host {rank} of 3 lost the connection to another host" in error


def test_torchrun_restarts_a_failed_prefill(tmp_path: Path) -> None:
    done = launch(2, str(tmp_path), "restart", torchrun=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [f.read_text("utf-8") for f in sorted(tmp_path.glob("attempt*.txt"))] == ["1", "1"]


def test_needs_torchrun() -> None:
    with pytest.raises(ValueError, match="torchrun did not start this process"), (
        apb.torchrun_group()
    ):  # fmt: skip
        pass


def test_needs_an_initialised_group() -> None:
    with pytest.raises(ValueError, match="not initialised: start with torchrun"):
        apb.DistributedGroup()

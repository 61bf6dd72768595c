from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import testbed
from apb.cli import app
from apb.costs import MODELS, NETWORKS, costs, model_shape
from apb.registry import STRATEGIES, make_strategy

runner = CliRunner()


def invoke(*arguments: str) -> list[dict]:
    result = runner.invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])["rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(testbed.smollm2_path())
    tokenizer.save_pretrained(path)
    testbed.tiny("llama", vocab_size=len(tokenizer)).save_pretrained(path)
    return path


def test_explain_at_64_hosts_and_a_million_tokens() -> None:
    rows = invoke("explain", "--tokens", "1048576", "--hosts", "64", "--network", "10gbe")
    assert [r["strategy"] for r in rows] == list(STRATEGIES)
    by_name = {r["strategy"]: r for r in rows}
    assert by_name["zigzag"]["balance"] > 0.999 > 0.9 > by_name["ring"]["balance"]
    assert by_name["spava"]["balance"] > by_name["apb"]["balance"]
    # With l_p = l_b / 8 the last of 64 hosts sees eight blocks' worth of passed keys: README.
    assert by_name["star"]["flops"] < by_name["apb"]["flops"] < by_name["ring"]["flops"]
    assert all(r["overlapped_seconds"] <= r["serial_seconds"] for r in rows)


def test_costs_against_known_numbers() -> None:
    """Dense: 2 * parameters * n, and 2 n² d of attention; ring: 7 blocks of 16K tokens a layer."""
    model = MODELS["llama-3.1-8b"]
    n = 131072
    dense = costs(make_strategy("dense"), model, n, 1)
    assert model.parameters == pytest.approx(8.03e9, rel=1e-3)
    linear = 2 * n * 32 * model.layer_parameters
    attention = 32 * 2 * n * (n + 1) * 4096
    assert dense.flops == pytest.approx(linear + attention)
    ring = costs(make_strategy("ring"), model, n, 8)
    assert ring.hosts[0].bytes_sent == 32 * 448 * 2**20  # 448 MiB a layer
    apb = costs(make_strategy("apb", "key-norm"), model, n, 8)
    mean = sum(h.bytes_sent for h in apb.hosts) / 8 / 32
    assert mean == 28 * 2**20  # 28 MiB a layer: half of an all-gather's 56
    assert [h.bytes_sent for h in apb.hosts] == sorted((h.bytes_sent for h in apb.hosts), reverse=1)
    slow = costs(make_strategy("ring"), model, n, 8, network=NETWORKS["1gbe"])
    assert slow.serial_seconds > ring.serial_seconds


def test_the_smollm2_table_of_work_saved() -> None:
    """Total work, dense over APB, 32K on 8 hosts; and the critical path against ring and Star."""
    model = MODELS["smollm2-135m"]
    found = {
        name: costs(make_strategy(name, "key-norm" if name == "apb" else None), model, 32768, 8)
        for name in ("dense", "ring", "zigzag", "star", "apb")
    }
    slowest = {
        name: max(h.linear_flops + h.attention_flops for h in c.hosts) for name, c in found.items()
    }
    assert found["dense"].flops / found["apb"].flops == pytest.approx(2.26, abs=0.05)
    assert slowest["ring"] / slowest["apb"] == pytest.approx(9.57 / 3.01, abs=0.1)
    assert slowest["star"] / slowest["apb"] == pytest.approx(4.06 / 3.01, abs=0.05)


def test_a_folder_gives_its_shape(folder: Path, tmp_path: Path) -> None:
    assert model_shape(str(folder)).layers == 2
    with pytest.raises(ValueError, match="model must be one of"):
        model_shape("gpt")
    (tmp_path / "config.json").write_text('{"hidden_size": 4, "num_attention_heads": 2}', "utf-8")
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        model_shape(str(tmp_path))


def write(path: Path, samples: list) -> Path:
    path.write_text("".join(json.dumps(s) + "\n" for s in samples), "utf-8")
    return path


def test_run_answers_and_goes_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    samples = [{"id": i, "document": "word " * (30 + i), "query": "What?"} for i in range(3)]
    source, output = write(tmp_path / "in.jsonl", samples), tmp_path / "out.jsonl"
    arguments = ["run", str(folder), str(source), "-o", str(output), "--max-new-tokens", "3"]
    assert runner.invoke(app, arguments).exit_code == 0
    whole = output.read_text("utf-8").splitlines()
    answers = [json.loads(line) for line in whole]
    assert [a["id"] for a in answers] == [0, 1, 2] and "document" not in answers[0]
    # Killed in the middle of line 2.
    output.write_text(whole[0] + "\n" + whole[1][:20], "utf-8")
    assert runner.invoke(app, arguments).exit_code == 0
    again = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [a["answer"] for a in again] == [a["answer"] for a in answers]


def test_run_under_torchrun_is_run_on_virtual_hosts(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"document": "word " * 30, "query": "What?"}])
    common = [str(folder), str(source), "--max-new-tokens", "3", "--strategy", "zigzag"]
    virtual, real = tmp_path / "virtual.jsonl", tmp_path / "real.jsonl"
    done = runner.invoke(app, ["run", *common, "-o", str(virtual), "--hosts", "2"])
    assert done.exit_code == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "apb.cli", "run", *common, "-o", str(real),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads(f.read_text("utf-8")) for f in (virtual, real))
    assert first["answer"] == second["answer"] and second["hosts"] == 2


def test_bench_times_what_it_is_asked(folder: Path) -> None:
    rows = invoke(
        "bench", str(folder), "--tokens", "64", "--hosts", "2", "--repeats", "1",
        "--strategy", "ring", "--strategy", "apb",
    )  # fmt: skip
    assert [r["strategy"] for r in rows] == ["ring", "apb"]
    assert all(0 < r["critical_path"] for r in rows) and rows[0]["bytes_sent"] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1 is not JSON"), ('{"document": "a"}', "expected"), ("[1]", "expected")],
)
def test_bad_lines_are_named(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(line + "\n", "utf-8")
    with pytest.raises(ValueError, match=message):
        invoke("run", str(folder), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--network must be one of"):
        invoke("explain", "--network", "5g")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        invoke("bench", str(tmp_path))

"""The console script, in its own process where exit codes matter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import testbed
from cpmcu._cli_options import parse_bytes
from cpmcu.cli import app


def cpmcu(*arguments, stdin=None):
    command = [sys.executable, "-c", "from cpmcu.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def gguf():
    return testbed.smollm2_gguf()


def test_generate_streams_text_and_stats(gguf):
    prompt = ("--prompt", "The capital of France is", "-n", 4)
    run = cpmcu("generate", gguf, *prompt, "--stats")
    assert run.returncode == 0 and "Paris" in run.stdout
    assert json.loads(run.stderr)["new_tokens"] == 4


def test_generate_json_from_messages(gguf, tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "Say hi."}]))
    result = json.loads(invoke("generate", gguf, "--messages", file, "-n", 6, "--json").stdout)
    assert result["finish_reason"] in ("stop", "length") and result["text"]
    assert set(result["stats"]) >= {"prefill_tokens_per_second", "peak_memory_bytes"}


def test_chat_over_a_pipe(gguf):
    run = cpmcu("chat", gguf, "-n", 8, stdin="What is the capital of France?\n")
    assert run.returncode == 0 and "Paris" in run.stdout and ">" not in run.stdout


def test_plan_loads_nothing(gguf):
    options = ("--bandwidth", "35G", "--dtype", "float32", "--json")
    made = json.loads(invoke("plan", gguf, *options, "--quant", "float32").stdout)
    assert made["weight_bytes"] == made["parameters"] * 4 == 538060032
    kept = json.loads(invoke("plan", gguf, *options).stdout)
    # Matrices in Q4_1: 5 bits a weight; the embedding in Q8_0, 8.5; norms in float32.
    layers, embedding, norms = 106_168_320, 49152 * 576, 61 * 576
    assert kept["weight_bytes"] == layers * 5 / 8 + embedding * 8.5 / 8 + norms * 4
    shown = invoke("plan", gguf, "--bandwidth", "35G", "--memory-limit", "300M").stdout
    assert "largest context that fits" in shown and "does not fit: take --context" in shown


def test_bench_and_selfcheck(tiny_folder):
    _, folder = tiny_folder("llama")
    timed = invoke("bench", folder, "--prompt-tokens", "8,16", "--new-tokens", 2, "--json").stdout
    assert [row["prompt_tokens"] for row in json.loads(timed)["rows"]] == [8, 16]
    checks = json.loads(invoke("selfcheck", "--json").stdout)
    kinds = ["float32", "bfloat16", "int8", "int4"]
    assert [check["dtype"] for check in checks] == [*kinds, *kinds, *kinds[:2]]
    assert [check["backend"] for check in checks[:4]] == ["gpu"] * 4
    assert all(check["passed"] for check in checks)


def test_selfcheck_notices_a_wrong_backend(monkeypatch):
    from cpmcu import reference, selfcheck

    rope = reference.RopeTable.rows
    shifted = lambda self, start, end, **k: rope(self, start + (start > 0), end + (start > 0), **k)  # noqa: E731
    monkeypatch.setattr(reference.RopeTable, "rows", shifted)
    assert not any(check.passed for check in selfcheck.run() if check.available)
    assert CliRunner().invoke(app, ["selfcheck"]).exit_code == 1


def broken_model(kind, tmp_path, tiny_folder, gguf):
    if kind == "no such model":
        return tmp_path / "none"
    if kind == "truncated gguf":
        (tmp_path / "t.gguf").write_bytes(Path(gguf).read_bytes()[:5_000_000])
        return tmp_path / "t.gguf"
    folder = shutil.copytree(tiny_folder("llama")[1], tmp_path / "m")
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no such model", "no such model; expected"),
        ("no weights", "no weights; expected model.safetensors"),
        ("truncated safetensors", "not a valid safetensors file"),
        ("truncated gguf", "truncated or corrupt, copy it again"),
    ],
)
def test_a_broken_model_ends_in_one_line_and_code_2(tmp_path, tiny_folder, gguf, kind, message):
    run = cpmcu("generate", broken_model(kind, tmp_path, tiny_folder, gguf), "--prompt", "x")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr


def test_user_errors(gguf, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("word " * 9000)
    run = cpmcu("generate", gguf, "--prompt-file", long)
    assert run.returncode == 2 and "above max_context=8192" in run.stderr
    long.write_bytes(b"\xff\xfe")
    for arguments, message in (
        (("--prompt-file", long), "not UTF-8 text"),
        (("--messages", long), "not UTF-8 text"),
        ((), "give one of --prompt, --prompt-file, --messages; got 0"),
        (("--prompt", "x", "--memory-limit", "lots"), "--memory-limit must be a number of bytes"),
    ):
        result = CliRunner().invoke(app, ["generate", str(gguf), *map(str, arguments)])
        assert message in str(result.exception)


@pytest.mark.parametrize(
    ("text", "value"), [("800M", 8e8), ("4GiB", 2**32), ("35e9", 35e9), ("1.5k", 1500), ("7", 7)]
)
def test_parse_bytes(text, value):
    assert parse_bytes(text, "--x") == value


@pytest.mark.parametrize("text", ["", "G", "-1", "0", "4Q", "1.2.3", "1e99"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="--x must be"):
        parse_bytes(text, "--x")


def test_importing_is_light():
    code = (
        "import sys, torch, time; s = time.perf_counter(); import cpmcu; "
        "bad = {'transformers', 'typer', 'rich', 'matplotlib', 'scipy'} & set(sys.modules); "
        "assert not bad, bad; assert time.perf_counter() - s < 1; "
        "cpmcu.Engine; assert 'transformers' not in sys.modules; print(cpmcu.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "0.1.0"


def test_quantize_and_convert(tiny_folder, tmp_path):
    _, folder = tiny_folder("llama")
    out, file = tmp_path / "small", tmp_path / "small.gguf"
    shown = invoke("quantize", folder, "--method", "rtn", "-o", out).stdout
    assert "gate_up" in shown and "cpmcu generate" in shown
    report = json.loads(invoke("quantize", folder, "--method", "rtn", "-o", out, "--json").stdout)
    assert report["options"]["bits"] == 4 and len(report["errors"]) == 2
    assert "nothing was rounded" in invoke("convert", out, "-o", file).stdout
    shown = invoke("convert", folder, "-o", tmp_path / "half.gguf", "--type", "F16").stdout
    assert "tensors were rounded: relative error" in shown
    run = cpmcu("quantize", folder, "-o", tmp_path / "gptq")
    assert run.returncode == 2 and "give --calib FILE" in run.stderr and run.stderr.count("\n") == 1
    run = cpmcu("convert", folder, "-o", file)
    assert run.returncode == 2 and "remove it or take another name" in run.stderr

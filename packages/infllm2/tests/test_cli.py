from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from infllm2 import selfcheck as selfcheck_module
from infllm2.cli import app


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_selfcheck_finds_every_backend_right() -> None:
    output = run("selfcheck")
    # Reference and torch with three dtypes, and two more where the CPU kernels are built.
    assert output.count(" ok ") in (6, 8) and "WRONG" not in output
    assert re.search(r"torch +│ bfloat16 +│ yes +│ yes", output)


def test_selfcheck_finds_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from infllm2.backends import torch_gather

    right = torch_gather.attend

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **kwargs)
        return out + 0.1, lse

    monkeypatch.setattr(torch_gather, "attend", wrong)
    result = CliRunner().invoke(app, ["selfcheck"], env={"COLUMNS": "200"})
    assert result.exit_code == 1 and result.output.count("WRONG") == 3


def test_selfcheck_says_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from infllm2.backends import torch_backend

    monkeypatch.setattr(
        torch_backend.TorchBackend, "is_supported", lambda *_: (False, "no such machine")
    )
    assert "no: no such machine" in run("selfcheck")
    assert not any(c.ok for c in selfcheck_module.check_backends() if c.backend == "torch")


def test_explain_shows_the_bounds_of_the_trained_model() -> None:
    output = run("explain", "--tokens", "131072")
    assert "96 blocks of 64" in output and "63 chosen" in output
    assert "11.64×" in output and "3.9%" in output


def console(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from infllm2.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    bad = console("explain", "--window-size", "100")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: window_size must be a multiple of block_size")
    assert bad.stderr.count("\n") == 1
    missing = console("visualize", str(tmp_path / "no"), "--prompt-file", "x", "-o", "y.png")
    assert missing.returncode == 2 and "does not exist" in missing.stderr


def test_bench_times_both_calls_and_finds_the_switch() -> None:
    options = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--repeats", "1"]
    options += ["--window-size", "128", "--topk", "2", "--piece", "32", "--dtype", "float32"]
    output = run("bench", "--tokens", "300", "--tokens", "900", *options)
    last = json.loads(output.strip().splitlines()[-1])
    calls = [(r["tokens"], r["kind"], r["queries"]) for r in last["rows"]]
    assert calls == [
        (300, "decode", 1), (300, "prefill", 32), (900, "decode", 1), (900, "prefill", 32)
    ]  # fmt: skip
    assert all(r[n] > 0 for r in last["rows"] for n in ("selection", "sparse", "dense", "torch"))
    assert 4 * 64 <= last["dense_len"] <= 6 * 4 * 64
    bad = CliRunner().invoke(app, ["bench", "--dtype", "int8"])
    assert "--dtype must be one of bfloat16, float32, float16" in str(bad.exception)
    bad = CliRunner().invoke(app, ["bench", "--heads", "5"])
    assert "heads must be a multiple of kv_heads, got 5 and 2" in str(bad.exception)


def test_explain_expects_times_where_it_knows_the_machine() -> None:
    # 1,000 tokens, one head of 100: 400 bytes a token are 0.4 ms at 1 GB/s.
    sizes = ["--tokens", "1000", "--heads", "1", "--kv-heads", "1", "--head-dim", "100"]
    output = run("explain", *sizes, "--bandwidth", "1", "--compute", "100")
    assert "0.4 ms" in output and "prefill, expected" in output
    bad = CliRunner().invoke(app, ["explain", "--bandwidth", "-1"])
    assert "must be positive" in str(bad.exception)


def test_visualize_draws_a_model_s_choice(tmp_path: Path) -> None:
    testbed = pytest.importorskip("testbed")
    pytest.importorskip("matplotlib")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    testbed.tiny("llama").save_pretrained(folder)
    words = {f"w{i}": i for i in range(250)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(f"w{i * 7 % 250}" for i in range(500)), encoding="utf-8")
    picture = tmp_path / "out.png"
    options = ["--window-size", "64", "--topk", "2", "--block-size", "32"]
    options += ["--kernel-size", "8", "--kernel-stride", "4", "--max-tokens", "400"]
    output = run(
        "visualize", str(folder), "--prompt-file", str(prompt), "-o", str(picture), *options
    )
    assert "layer 1, 400 tokens" in output
    # Four of up to thirteen blocks: Σ min(b + 1, 4) over Σ (b + 1).
    own = [t // 32 for t in range(400)]
    share = sum(min(b + 1, 4) for b in own) / sum(b + 1 for b in own)
    assert f"{share:.1%}" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.glob("*.part")] == []
    result = CliRunner().invoke(
        app,
        ["visualize", str(folder), "--prompt-file", str(prompt), "-o", "x.png", "--layer", "2"],
    )
    assert isinstance(result.exception, ValueError)
    assert "layer must lie in -2 … 1, got 2" in str(result.exception)

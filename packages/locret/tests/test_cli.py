from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from locret.cli import app

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import RetainingHeads  # noqa: E402


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def console(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from locret.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    testbed.tiny("llama-gqa3").save_pretrained(folder)
    words = {f"w{i}": i for i in range(250)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 250, (700,), generator=generator).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return path


# Facts would be unknown words alone here.
TRAIN = ("--texts", 10, "--length", 64, "--answer", 8, "--hidden", 8, "--epochs", 2, "--facts", 0)


@pytest.fixture(scope="module")
def heads(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("heads")
    last = json.loads(run("train", model, "--data", text, "-o", output, *TRAIN).splitlines()[-1])
    assert last["texts"] == 9 and set(last["overlap"]) == {"ridge", "mlp"}
    return output


def test_trained_heads_load_and_the_same_command_makes_them_again(
    model: Path, text: Path, heads: Path, tmp_path: Path
) -> None:
    assert not (heads / "work").exists()
    run("train", model, "--data", text, "-o", tmp_path / "h", *TRAIN, "--keep")
    assert (tmp_path / "h/work/labels-00000.safetensors").exists()
    first, second = RetainingHeads.load(heads), RetainingHeads.load(tmp_path / "h")
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_eval_compares_heads_and_scorers(model: Path, text: Path, heads: Path) -> None:
    output = run(
        "eval", model, "--data", text, "--heads", heads, "--texts", 2, "--length", 64,
        "--answer", 8, "--budget", 1.0, "--budget", 0.25, "--chunk", 16, "--scorer", "random",
        "--scorer", "h2o",
    )  # fmt: skip
    last = json.loads(output.splitlines()[-1])
    names = {"heads", "heads, keydiff", "random", "h2o"}
    assert set(last["overlap"]) == names and last["budgets"] == [1.0, 0.25]
    assert all(0 <= value <= 1 for value in last["overlap"].values())
    for name in names:  # with room for all it is the model
        assert last["nll"][name][0] == pytest.approx(last["nll"]["full"][0], abs=1e-3)
        assert last["nll"][name][1] != pytest.approx(last["nll"]["full"][1], abs=1e-3)


def test_generate_continues_and_answers(model: Path, text: Path, heads: Path) -> None:
    sizes = ("--budget", 16, "--chunk", 8, "--local", 4, "--sinks", 2, "--new", 5)
    prompt = ("--prompt-file", text)
    first = run("generate", model, *prompt, "--heads", heads, *sizes)
    assert len(first.split()) == 5 and first == run(
        "generate", model, *prompt, "--heads", heads, *sizes
    )
    asked = run("generate", model, *prompt, *sizes, "--question", "w1 w2", "--question", "w3")
    lines = [line for line in asked.splitlines() if line.startswith("w")]
    assert lines[0].startswith("w1 w2") and lines[1].startswith("w3")
    both = run("generate", model, *prompt, "--heads", heads, "--keydiff", 1e6, *sizes)
    assert both == run("generate", model, *prompt, "--scorer", "keydiff", *sizes)


def test_bench_times_both(model: Path) -> None:
    sizes = ("--budget", 16, "--chunk", 8, "--local", 4, "--sinks", 2)
    output = run("bench", model, "--tokens", 60, "--repeats", 1, *sizes)
    (row,) = json.loads(output.splitlines()[-1])["rows"]
    assert row["peak"] == 24 and row["kv_bytes"] == row["dense_kv_bytes"] * 20 / 60
    assert all(row[n] > 0 for n in ("prefill", "dense_prefill", "ratio", "decode", "dense_decode"))


def test_explain_reads_no_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    sizes = ("--budget", 100, "--chunk", 50, "--local", 10)
    output = run("explain", tmp_path, "--tokens", 1000, "--bytes-per-value", 4, *sizes)
    # 2 layers, 2 heads of 16, keys and values: 512 bytes a token; 1,000 against 150 of them.
    assert "0.512 MB" in output and "0.0768 MB" in output and "6.67×" in output


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_visualize_draws_what_was_kept(
    model: Path, text: Path, heads: Path, tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"kept.{suffix}"
    output = run(
        "visualize", model, "--prompt-file", text, "-o", picture, "--heads", heads,
        "--budget", 32, "--chunk", 16, "--max-tokens", 300,
    )  # fmt: skip
    assert "48 of 300 tokens kept by each head, 2 layers" in output
    assert (
        picture.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml") and len(list(tmp_path.iterdir())) == 1
    )


def test_errors_are_one_line_and_exit_code_2(model: Path, text: Path, tmp_path: Path) -> None:
    bad = console("explain", tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "config.json" in bad.stderr
    assert bad.stderr.count("\n") == 1
    for arguments, message in (
        (("generate", model, "--prompt-file", text, "--scorer", "best"), "--scorer must be one of"),
        (("generate", model, "--prompt-file", text, "--keydiff", 1), "--keydiff needs --heads"),
        (
            ("generate", model, "--prompt-file", text, "--keydiff", "-1"),
            "--keydiff must be 0 or more",
        ),
        (("generate", model, "--prompt-file", tmp_path / "no"), "does not exist"),
        (("generate", model, "--prompt-file", text, "--heads", tmp_path), "makes heads"),
        (("visualize", model, "--prompt-file", text, "-o", "x.pdf"), "must be .png or .svg"),
        (("eval", model, "--data", tmp_path / "no.txt"), "does not exist"),
        (("bench", model, "--dtype", "int3"), "--dtype must be one of"),
        (("bench", model, "--tokens", 0), "must be ≥ 1"),
        (("explain", model, "--budget", 4, "--sinks", 9), "budget 4 does not hold"),
        (("train", model, "--data", text, "-o", tmp_path / "h", "--epochs", 0), "epochs ≥ 1"),
        (("train", model, "--data", text, "-o", tmp_path / "h", "--facts", 2), "from 0 to 1"),
        (("train", model, "--data", text, "-o", tmp_path / "h", "--labels", "x"), "one of scores"),
    ):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code and message in str(result.exception), (arguments, result.exception)


def test_query_aware_heads_read_the_question_first(model: Path, text: Path, tmp_path: Path) -> None:
    output = run("train", model, "--data", text, "-o", tmp_path, "--query-aware", *TRAIN)
    assert json.loads(output.splitlines()[-1])["texts"] == 9
    assert RetainingHeads.load(tmp_path).config.query_aware
    sizes = ("--budget", 32, "--chunk", 16, "--local", 8, "--new", 4)
    source = ("--heads", tmp_path, "--prompt-file", text)
    output = run("generate", model, *source, *sizes, "--question", "w7 w8", "--question", "w9")
    first, second = output.splitlines()
    assert first.startswith("w7 w8") and second.startswith("w9")
    few = ("--budget", 8, "--chunk", 4, "--local", 8, "--new", 4, "--question", "w7 w8")
    both = run("generate", model, *source, *few, "--keydiff", 1e-9)  # still read first
    assert both == run("generate", model, *source, *few)
    output = run("eval", model, "--heads", tmp_path, "--data", text, "--scorer", "streaming",
                 "--budget", 0.5, "--texts", 2, "--length", 64, "--answer", 8)  # fmt: skip
    found = json.loads(output.splitlines()[-1])
    assert set(found["overlap"]) == {"heads", "heads, keydiff", "streaming"}


@pytest.mark.parametrize(
    "options",
    [("--storage", "int4"), ("--budgets", "layer"), ("--merge", 0.5),
     ("--budgets", "head", "--merge", 0.5, "--storage", "int8")],
    ids=str,
)  # fmt: skip
def test_options_reach_the_cache(model: Path, text: Path, heads: Path, options: tuple) -> None:
    sizes = ("--budget", 16, "--chunk", 8, "--local", 4, "--sinks", 2)
    source = ("--heads", heads, "--prompt-file", text)
    plain = run("generate", model, *source, *sizes, "--new", 12)
    assert run("generate", model, *source, *sizes, "--new", 12, *options) != plain
    output = run("explain", model, "--tokens", 1000, *sizes, *options)
    assert ("in the mean, none above 40" in output) == ("--budgets" in options)
    bare = run("explain", model, "--tokens", 1000, *sizes)
    held = [next(x for x in o.splitlines() if "most held" in x) for o in (bare, output)]
    assert (held[0] == held[1]) == ("--storage" not in options)

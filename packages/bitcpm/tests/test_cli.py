from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bitcpm import cli
from bitcpm.cpu_library import kernels

runner = CliRunner()


def run(*args) -> str:
    result = runner.invoke(cli.app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_pack_unpack(ternary_folder, tmp_path):
    out = run("inspect", ternary_folder)
    assert "ternary tensors: 14, damaged: 0, full precision: 7" in out and "group size: 32" in out
    assert "model.layers.0" in run("inspect", ternary_folder, "--all")
    report = json.loads(run("inspect", ternary_folder, "--json").splitlines()[-1])
    assert report["group_size"] == 32
    out = run("pack", ternary_folder, "-o", tmp_path / "packed", "--codec", "2bit")
    assert "14 ternary tensors in groups of 32" in out and "times smaller" in out
    assert "not packed" not in run("inspect", tmp_path / "packed")
    run("unpack", tmp_path / "packed", "-o", tmp_path / "back")
    assert (
        run("inspect", tmp_path / "back").splitlines()[1:]
        == (run("inspect", ternary_folder).splitlines()[1:])
    )


def test_quantise_warns(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    out = run("quantise", tmp_path / "dense", "-o", tmp_path / "out", "--group-size", "32")
    assert "relative weight error" in out and "expect it to produce nonsense" in out


def test_selfcheck():
    out = run("selfcheck")
    assert out.splitlines()[-1] == "all good" and "FAIL" not in out


def test_user_errors_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["bitcpm", "inspect", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.skipif(kernels()[0] is None, reason=kernels()[1])
def test_bench_prints_every_way():
    out = run("bench", "--out", 128, "--in", 256, "--megabytes", 0, "--repeats", 1, "--json")
    report = json.loads(out.splitlines()[-1])
    ways = [row["way"] for row in report["rows"]]
    assert len(ways) == 7 and ways[-1] == "torch bfloat16" and "1.6bit exact" in ways
    assert all(row["seconds"] > 0 for row in report["rows"])
    assert report["rows"][0]["bits"] == pytest.approx(1.75)


def test_train_writes_a_ternary_model_that_packs(tiny, tmp_path):
    pytest.importorskip("accelerate")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {chr(97 + i): i for i in range(26)} | {" ": 26, "<eos>": 27}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tiny("llama").save_pretrained(tmp_path / "dense")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        tmp_path / "dense"
    )
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 60)
    options = [
        *("--steps", 12, "--block", 16, "--batch", 4, "--warmup", 1, "--qat", 0.5),
        *("--group-size", 16, "--teacher", tmp_path / "dense", "--json"),
    ]
    source = tmp_path / "dense", tmp_path / "text.txt"
    report = json.loads(run("train", *source, "-o", tmp_path / "out", *options).splitlines()[-1])
    assert report["steps"] == 12 and report["qat_steps"] == 6 and report["tokens"] == 768
    assert "group size: 16" in run("inspect", tmp_path / "out")
    assert "14 ternary tensors" in run("pack", tmp_path / "out", "-o", tmp_path / "packed")
    again = run("train", *source, "-o", tmp_path / "again", *options)
    assert "12 steps" in again
    assert (tmp_path / "again.training").exists()
    with pytest.raises(ValueError, match="exists: name a new folder"):
        run("train", *source, "-o", tmp_path / "out", *options)

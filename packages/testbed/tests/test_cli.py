from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import testbed
from testbed.cli import app

runner = CliRunner()


def run(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info_names_everything() -> None:
    shown = run("info")
    report = json.loads(run("info", "--json"))
    assert set(report["corpora"]) == set(testbed.corpora())
    assert report["wheels"]["gensim"] == "4.4.0"
    assert report["smollm2"] == str(testbed.smollm2_path())
    for name in [*report["corpora"], *report["ruler"], *report["tiny"]]:
        assert name in shown


def test_info_without_the_model_converts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    assert json.loads(run("info", "--json"))["smollm2"].endswith("not converted yet")
    assert list(tmp_path.iterdir()) == []


def test_corpus_to_the_screen_and_to_a_file(tmp_path: Path) -> None:
    assert "343 documents, " in run("corpus", "news")
    out = tmp_path / "news.jsonl"
    arguments = ("corpus", "news", "--split", "test", "--limit", "4", "--jsonl")
    assert run(*arguments, str(out)) == f"4 lines in {out}\n"
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    wanted = testbed.corpus("news", "test")[:4]
    assert [testbed.Document(**row) for row in rows] == wanted
    assert run(*arguments, "-") == out.read_text("utf-8")


def test_ruler_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "vt.jsonl"
    run("ruler", "vt", "--tokens", "1024", "--n", "2", "--seed", "3", "--jsonl", str(out))
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(testbed.smollm2_path())
    for row, sample in zip(rows, testbed.ruler("vt", 1024, 2, 3, tokenizer), strict=True):
        assert row["answers"] == list(sample.answers)
        assert row["text"] == testbed.ruler_prompt(sample, tokenizer)
    assert [row["index"] for row in rows] == [0, 1]
    assert sample.answers[0] in run("ruler", "vt", "--tokens", "1024", "--n", "2", "--seed", "3")


def test_smollm2_prints_its_folder() -> None:
    assert run("smollm2") == f"{testbed.smollm2_path()}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus", "nope"], "error: corpus must be one of wikipedia"),
        (["ruler", "vt", "--tokenizer", "/no/such"], "error: --tokenizer must be a folder"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], message: str) -> None:
    # The console script itself, which is what turns exceptions into a line and a code.
    program = "from testbed.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "MINICPM4_DEBUG": "0"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith(message), done.stderr

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bitcpm import cli

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

"""The commands as a user types them, on tables and runs made here."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import testbed
from densing import LossLaw, ScoreLaw

from .fitting.simulated import runs

DENSING = Path(sys.executable).parent / "densing"


def densing(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([DENSING, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def write_csv(path: Path, columns: dict) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture
def ladder(tmp_path: Path) -> tuple[Path, Path]:
    """Runs and scores of a reference ladder."""
    draw = np.random.default_rng(0)
    n = np.repeat(10 ** np.linspace(6.7, 9, 6), 6)
    d = n * np.tile([10, 15, 20, 30, 40, 60], 6)
    loss = LossLaw(60, 0.3, 100, 0.28)(n, d) * np.exp(0.003 * draw.normal(size=36))
    at = np.linspace(0.15, 1.2, 30)
    score = ScoreLaw(0.7, -6.0, 0.5, 0.25)(at) + 0.01 * draw.normal(size=30)
    one = write_csv(tmp_path / "runs.csv", {"parameters": n, "tokens": d, "loss": loss})
    two = write_csv(tmp_path / "scores.csv", {"loss": at, "score": np.clip(score, 0, 1)})
    return one, two


def test_help_explains_every_command() -> None:
    text = densing("--help").stdout
    for command in ("fit", "density", "trend", "forecast", "report", "check-data", "loss"):
        assert command in text
        assert "Usage" in densing(command, "--help").stdout


def test_fit_prints_constants_intervals_and_held_out_errors(tmp_path: Path) -> None:
    data = runs()
    columns = {
        "Model Size": data["parameters"] / 1e9,
        "tokens": data["tokens"],
        "loss": data["loss"],
    }
    file = write_csv(tmp_path / "runs.csv", columns)
    out = tmp_path / "fit.json"
    done = densing(
        "fit", file, "--column", "parameters=Model Size * 1e9", "--hold-out-above", 1e9,
        "--resamples", 200, "-o", out, "--json",
    )  # fmt: skip
    values = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == values
    assert values["constants"]["alpha"] == pytest.approx(0.3478, abs=0.02)
    low, high = values["intervals"]["e"]["profile"]
    assert low < values["constants"]["e"] < high
    assert values["hold_out"]["worst_relative_error"] < 0.05
    assert values["data_sha256"] and values["units"]["e"] == "loss"
    assert "held out above 1e+09 parameters" in done.stdout


def test_a_ladder_becomes_a_reference_that_places_a_model(
    ladder: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "reference.json"
    done = densing(
        "fit", ladder[0], "--scores", ladder[1], "--no-irreducible", "--tokens", 1e11,
        "--chance", 0.25, "--resamples", 100, "-o", out,
    )  # fmt: skip
    assert "score law" in done.stdout
    found = densing(
        "density", "--parameters", "total", "--score", 0.8, "--size", 1e8, "--reference", out,
        "--json",
    )  # fmt: skip
    values = json.loads(found.stdout.splitlines()[-1])
    assert values["interval"][0] < values["density"] < values["interval"][1]
    low = densing("density", "--parameters", "total", "--score", 0.2, "--size", 1e8,
                  "--reference", out)  # fmt: skip
    assert "below the reference's range" in low.stdout


def test_trend_always_brings_the_sensitivity_table(tmp_path: Path) -> None:
    out = tmp_path / "trend.json"
    done = densing("trend", "--parameters", "total", "--resamples", 50, "-o", out, "--json")
    assert re.search(r"density doubles in \d+ days", done.stdout)
    for row in ("least_squares", "without a family", "minimum size", "benchmark", "left out:"):
        assert row in done.stdout
    values = json.loads(out.read_text())
    assert values == json.loads(done.stdout.splitlines()[-1])
    assert len(values["sensitivity"]) > 15
    broken = densing(
        "trend", "--parameters", "total", "--resamples", 20, "--break-on", "2024-03-01"
    )
    assert "from then on in" in broken.stdout


def test_total_or_active_must_be_said() -> None:
    done = densing("trend", code=2)
    assert "--parameters" in done.stderr
    done = densing("trend", "--parameters", "both", code=2)
    assert "basis must be 'total' or 'active', got 'both'" in done.stderr


def test_forecast_by_every_estimator() -> None:
    done = densing("forecast", "--parameters", "total", "--score", 0.7, "--by", "2027-01-01",
                   "--resamples", 50, "--json")  # fmt: skip
    values = json.loads(done.stdout.splitlines()[-1])
    for row in values["forecasts"]:
        assert row["interval"][0] <= row["parameters"] * 1.01
    assert len(values["forecasts"]) == 6
    assert "a trend does not say whether it goes on" in done.stdout
    done = densing("forecast", "--parameters", "total", "--score", 0.1, "--by", "2027-01-01")
    assert "below the reference's range: no forecast" in done.stdout


def test_density_of_every_model_of_a_table() -> None:
    done = densing("density", "--parameters", "active")
    assert "DeepSeek-V3-Base" in done.stdout and "left out:" in done.stdout


def test_report_is_one_page_that_needs_nothing(ladder: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    densing(
        "report", "--parameters", "total", "-o", out, "--runs", ladder[0], "--scores", ladder[1],
        "--chance", 0.25, "--resamples", 50,
    )  # fmt: skip
    page = out.read_text()
    assert page.count("<svg") == 5  # density, sensitivity, two laws, compression
    for part in ("Density over time", "What other choices give", "misses these by", "Compression",
                 "Left out", "Doubts about the data"):  # fmt: skip
        assert part in page
    assert not re.search(r'(src|href)="(?!#|data:)', page), "the page needs another file"
    again = tmp_path / "again.html"
    densing("report", "--parameters", "total", "-o", again, "--resamples", 20)
    assert again.read_text().count("<svg") == 3


def test_names_from_a_table_are_escaped(tmp_path: Path) -> None:
    rows = {
        "model": ["<script>alert(1)</script>-7B", "b-13B", "c-30B", "d-7B"],
        "family": ["F", "F", "F", "G"],
        "size": [7e9, 13e9, 30e9, 7e9],
        "date": ["2023-03-01", "2023-03-01", "2023-04-01", "2024-01-01"],
        "MMLU": [0.35, 0.45, 0.55, 0.6],
    }
    out = tmp_path / "report.html"
    densing("report", write_csv(tmp_path / "t.csv", rows), "--parameters", "total", "--anchor", "F",
            "-o", out, "--resamples", 20)  # fmt: skip
    assert "<script>alert" not in out.read_text()


def test_check_data_names_problems_and_fails_where_it_left_something_out(tmp_path: Path) -> None:
    rows = {"model": ["a-7B", "a-7B", "b-8x7B"], "MMLU": [45, 46, 0.7], "size": [7e9, 7e9, 47e9]}
    done = densing("check-data", write_csv(tmp_path / "t.csv", rows), "--json", code=1)
    kinds = {p["kind"] for p in json.loads(done.stdout.splitlines()[-1])["problems"]}
    assert kinds >= {"duplicate", "scale", "active"}
    assert "MMLU: 2 scores, mixed" in done.stdout
    assert "nothing doubtful found" in densing("check-data").stdout


def test_loss_of_a_model_folder(tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(testbed.smollm2_path())
    testbed.tiny("llama-gqa3", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "2 + 2 =", "answer": " 4"}\n{"prompt": "a", "answer": " b"}\n')
    out = tmp_path / "losses.jsonl"
    done = densing("loss", folder, pairs, "-o", out, "--json")
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["items"] == 2 and values["nats_per_byte"] > 0
    assert len(out.read_text().splitlines()) == 3
    again = densing("loss", folder, pairs, "-o", out, "--json")
    assert json.loads(again.stdout.splitlines()[-1]) == values
    done = densing("loss", tmp_path, pairs, code=2)
    assert "is no transformers folder" in done.stderr
    for module, message in (("json", "has no register()"), ("nonsense_", "No module named")):
        done = densing("loss", folder, pairs, "--register", module, code=2)
        assert message in done.stderr
    assert torch.__version__


def test_loss_of_an_architecture_that_a_module_brings(tmp_path: Path) -> None:
    home = pytest.importorskip("minicpm4")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(testbed.smollm2_path())
    config = home.MiniCPM4Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, dim_model_base=16,
    )  # fmt: skip
    home.MiniCPM4ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "2 + 2 =", "answer": " 4"}\n')
    done = densing("loss", tmp_path, pairs, "--register", "minicpm4", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["items"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trend", "nowhere.csv", "--parameters", "total"], "nowhere.csv does not exist"),
        (["trend", "--parameters", "total", "--benchmark", "IQ"], "unknown benchmark 'IQ'"),
        (["trend", "--parameters", "total", "--anchor", "X"], "no family 'X'"),
        (["trend", "--parameters", "total", "--estimator", "mean"], "unknown estimator 'mean'"),
        (["trend", "--parameters", "total", "--since", "2023"], "--since '2023': expected YYYY"),
        (["density", "--parameters", "total", "--score", "0.5"], "belong together"),
        (["density", "--parameters", "total", "--score", "50", "--size", "1e9"], "percent?"),
        (["fit", "nowhere.csv"], "nowhere.csv does not exist"),
    ],
)
def test_mistakes_end_with_one_clear_line(arguments: list[str], message: str) -> None:
    done = densing(*arguments, code=2)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert message in done.stderr

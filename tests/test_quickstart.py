"""The pipeline end to end at a reduced size: what its artefacts hold, kills, mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import bitcpm

pytestmark = pytest.mark.slow

MINICPM4 = Path(sys.executable).parent / "minicpm4"
STAGES = [
    *("clean", "verify", "pretrain", "ternary", "sparse", "heads", "prefill", "generate"),
    *("density", "report"),
]


def minicpm4(*arguments: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MINICPM4, *arguments], cwd=cwd, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = minicpm4("run", "smoke", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "report: runs/smoke/report/report.html" in done.stdout
    return folder / "runs" / "smoke"


def metrics(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "metrics.json").read_text())


def test_clean_accounts_for_every_passage(finished: Path) -> None:
    result = metrics(finished, "clean")
    pool = result["pool"]
    assert pool["in"] == pool["kept"] + pool["rejected"] + pool["malformed"] > 100
    assert pool["in"] == sum(row["kept"] + row["dropped"] for row in result["by_source"])
    assert sum(result["by_reason"].values()) == pool["rejected"]
    folder = finished / "clean" / "filtered"
    for name, count in (("kept", pool["kept"]), ("rejected", pool["rejected"])):
        records = [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
        assert len(records) == count
        assert all(r["text"] and 0 <= r["ultraclean_score"] <= 1 for r in records)
    assert result["auc"]["seen sources"]["value"] > 0.8
    assert 0 <= result["auc"]["unseen sources"]["value"] <= 1


def test_verify_says_what_it_found_and_what_it_cost(finished: Path) -> None:
    result = metrics(finished, "verify")
    control, kept = (result["losses"][arm]["good text"] for arm in ("control", "kept"))
    gain = sum(a - b for a, b in zip(control, kept, strict=True)) / len(control)
    assert result["gain"] == pytest.approx(gain) and len(control) == 2
    assert result["verdict"] in ("helps", "hurts", "within noise")
    assert result["ledger"]["share_of_scratch"] < 1


def test_pretrain_learns(finished: Path) -> None:
    result = metrics(finished, "pretrain")
    losses = [row["loss"] for row in result["validation"]]
    assert losses[-1] < losses[0] - 0.5
    tokenizer = AutoTokenizer.from_pretrained(finished / "pretrain" / "model")
    text = "The quick brown fox, 1984."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_ternary_is_ternary_and_packs_without_loss(finished: Path) -> None:
    result = metrics(finished, "ternary")
    folder = finished / "ternary"
    plain = load_file(folder / "model" / "model.safetensors")
    packed = dict(bitcpm.load_packed(folder / "packed"))
    assert set(packed) >= set(plain)
    for name, tensor in plain.items():
        assert torch.equal(packed[name], tensor), name
    gate = plain["model.layers.0.mlp.gate_proj.weight"]
    for group in gate[0].split(result["group_size"]):
        assert len(group.unique()) <= 3
    size = sum(f.stat().st_size for f in (folder / "packed").glob("*.safetensors"))
    assert size == result["bytes"]["packed"] < 0.5 * result["bytes"]["bf16"]
    assert result["loss"]["ternary QAT"] < result["loss"]["ternary without training"]


def test_sparse_compares_the_same_prompts(finished: Path) -> None:
    result = metrics(finished, "sparse")
    assert result["cases"]
    for case in result["cases"]:
        assert case["dense"]["samples"] == case["sparse"]["samples"] >= 1
        assert 0 < case["sparse"]["visited_share"] < case["dense"]["visited_share"] == 1
    timings = json.loads((finished / "sparse" / "timings.json").read_text())
    assert all(t["dense"] > 0 and t["sparse"] > 0 for t in timings["attention_seconds"])


def test_prefill_sets_strategies_side_by_side(finished: Path) -> None:
    dense, zigzag, *approximate = metrics(finished, "prefill")["cases"]
    assert [c["strategy"] for c in (dense, zigzag)] == ["dense", "zigzag"]
    assert [c["strategy"] for c in approximate] == ["apb", "apb, trained heads"]
    assert dense["bytes_sent"] == dense["kl"] == 0
    assert zigzag["kl"] < 1e-4
    assert abs(zigzag["nll"] - dense["nll"]) < 1e-3
    for case in approximate:
        assert case["kl"] > 1e-4
        assert 0 < case["bytes_sent"] < zigzag["bytes_sent"]
        assert case["slowest_pairs"] < dense["slowest_pairs"]
    # Equal lengths: the compressors alone differ, and they choose other keys.
    assert approximate[0]["bytes_sent"] == approximate[1]["bytes_sent"]
    assert approximate[0]["kl"] != approximate[1]["kl"]
    timings = json.loads((finished / "prefill" / "timings.json").read_text())
    assert all(t["critical_path"] > 0 for t in timings["seconds"])


def test_heads_bound_the_memory_and_are_judged_beside_others(finished: Path) -> None:
    result = metrics(finished, "heads")
    for row in result["curve"]:
        assert row["bounded"] <= min(row["bound"], row["full"])
    assert result["curve"][-1]["full"] > 2 * result["curve"][-1]["bounded"]
    assert set(result["overlap"]) | {"full"} == set(result["losses"])
    assert all(0 < value[0] < 20 for value in result["losses"].values())
    assert (finished / "heads" / "heads" / "heads.safetensors").exists()


def test_generate_writes_text_and_times_it(finished: Path) -> None:
    result = metrics(finished, "generate")
    timings = json.loads((finished / "generate" / "timings.json").read_text())
    ours = {"ours, full precision": "bfloat16", "ours, ternary": "ternary"}
    assert set(ours) < set(result["models"]) and set(timings) == set(result["models"])
    assert {timings[name]["weights"] for name in ours} <= {*ours.values(), "float32"}
    for name, model in result["models"].items():
        assert all(sample["text"].strip() for sample in model["samples"])
        assert timings[name]["decode_tokens_per_second"] > 0
        assert timings[name]["peak_memory_bytes"] > 1e7
    facts = " ".join(s["text"] for s in result["models"]["smollm2, int4 weights"]["samples"])
    assert "Paris" in facts


def test_density_shows_its_sensitivity_and_places_the_pipelines_own_models(
    finished: Path,
) -> None:
    result = metrics(finished, "density")
    trend = result["trend"]
    assert {"estimator", "minimum size", "benchmark"} <= {r["choice"] for r in trend["sensitivity"]}
    shortest, longest = trend["range"]
    assert 30 < shortest <= trend["trend"]["doubling_days"] <= longest
    assert len({(r["parameters"], r["tokens"]) for r in result["runs"]}) == 6
    longest_runs = {r["parameters"]: r["nats_per_byte"] for r in result["runs"]}
    first_runs = {r["parameters"]: r["nats_per_byte"] for r in reversed(result["runs"])}
    assert all(longest_runs[size] < first_runs[size] for size in first_runs)
    loss = {row["name"]: row["nats_per_byte"] for row in result["own"]}
    assert loss["smollm2"] < loss["ours, full precision"] < loss["ours, ternary"] < 3
    for row in result["own"]:
        if row["beyond"]:
            assert row["density"] is None
        else:
            ratio = row["effective_parameters"] / row["model_parameters"]
            assert row["density"] == pytest.approx(ratio)
    page = (finished / "report" / "report.html").read_text()
    assert "choices give" in page


def test_report_is_one_page_that_needs_nothing(finished: Path) -> None:
    page = (finished / "report" / "report.html").read_text()
    for stage in STAGES[:-1]:
        assert f'id="{stage}"' in page
    assert page.count("<svg") >= 4
    assert not re.search(r'(src|href)="(?!#|data:|https://arxiv)', page), (
        "the page needs another file"
    )
    assert "minicpm4 run smoke --only sparse" in page


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"}
    done = minicpm4("run", "smoke", cwd=finished.parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("up to date") == len(STAGES)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"} == before


def test_killed_in_every_stage_it_ends_with_the_same_results(
    finished: Path, tmp_path: Path
) -> None:
    """SIGKILL once in each stage, some way into it; then the results of an uninterrupted run."""
    run = tmp_path / "runs" / "smoke"
    for stage in STAGES:
        process = subprocess.Popen(
            [MINICPM4, "run", "smoke"], cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        work = run / f"{stage}.work"
        while not work.exists() and not (run / stage).exists():
            assert process.poll() is None, f"ended before {stage}"
            time.sleep(0.02)
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        time.sleep(0.4 * manifest["seconds"])
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
    done = minicpm4("run", "smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in STAGES[:-1]:
        whole = json.loads((finished / stage / "manifest.json").read_text())["outputs"]
        again = json.loads((run / stage / "manifest.json").read_text())["outputs"]
        timed = {"timings"}
        assert {k: v for k, v in whole.items() if k not in timed} == {
            k: v for k, v in again.items() if k not in timed
        }, stage
    left = [p.name for p in run.iterdir() if p.name.endswith((".work", ".partial"))]
    assert not left


def clean_yaml(folder: Path, **changes: object) -> Path:
    """A pipeline of the stage `clean` alone, with some keys changed."""
    keys = {"good": ["reference"], "poor": ["newsgroups"], "seeds": ["reference", "newsgroups"]}
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"name": "mine", "stages": {"clean": {**keys, **changes}}}))
    return path


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def test_a_missing_corpus_file(tmp_path: Path) -> None:
    path = clean_yaml(tmp_path, good=["./nowhere.jsonl"], seeds=["./nowhere.jsonl", "newsgroups"])
    assert_one_clear_line(minicpm4("run", path, cwd=tmp_path), "./nowhere.jsonl", "does not exist")
    assert not (tmp_path / "runs").exists()


def test_a_corrupt_corpus_file(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut o')
    path = clean_yaml(tmp_path, good=["./bad.jsonl"], seeds=["./bad.jsonl", "newsgroups"])
    assert_one_clear_line(minicpm4("run", path, cwd=tmp_path), "bad.jsonl:2", "JSON")
    assert not list(tmp_path.glob("runs/*/clean*"))


def test_an_unknown_corpus(tmp_path: Path) -> None:
    path = clean_yaml(tmp_path, good=["wikipedja"], seeds=["wikipedja", "newsgroups"])
    assert_one_clear_line(minicpm4("run", path, cwd=tmp_path), "'wikipedja'", "wikipedia")


def test_a_wrong_key_and_an_unknown_stage(tmp_path: Path) -> None:
    path = clean_yaml(tmp_path, treshold=0.3)
    assert_one_clear_line(minicpm4("plan", path, cwd=tmp_path), "clean.treshold", "'threshold'")
    done = minicpm4("run", "smoke", "--only", "sprase", cwd=tmp_path)
    assert_one_clear_line(done, "'sprase'", "sparse")


def test_a_model_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    done = minicpm4("chat", "--model", "./model", cwd=tmp_path, input="hello\n")
    assert_one_clear_line(done, "model", "weights", "safetensors")


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(json.dumps({"name": "long", "stages": {"sparse": {"tokens": [16384]}}}))
    done = minicpm4("run", path, cwd=tmp_path)
    assert_one_clear_line(done, "stages.sparse.tokens", "16384", "8192")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        done = minicpm4("run", clean_yaml(tmp_path), "--out", disk / "run", cwd=tmp_path)
        assert_one_clear_line(done, "clean", "free", "--out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)

"""Tables in: every kind of bad data is named, and nothing is dropped in silence."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from densing import (
    Choices,
    curated_table,
    dated_densities,
    density,
    headline,
    read_csv,
    read_results,
)
from densing.checks import without_duplicates
from densing.csv_files import parse_column
from densing.sensitivity import table_text
from densing.table_density import anchor_reference, count
from densing.tables import Model, is_sparse_name, plain, size_in_name

TODAY = date(2026, 1, 1)
HEADER = "Model,Model Family,Model Size (B),Pretraining Data Size (T),Release date,MMLU"
GOOD = [
    "a/Fam-7B,Fam,7,1.0,2023-02-24,0.35",
    "a/Fam-13B,Fam,13,1.0,2023-02-24,0.47",
    "a/Fam-65B,Fam,65,1.4,2023-02-24,0.63",
    "b/New-7B,New,7,2.0,2023-12-01,0.55",
    "b/Newer-3B,Newer,3,3.0,2024-08-01,0.60",
]


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    file = path / "scores.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def kinds(table, model: str = "") -> list[str]:  # noqa: ANN001
    return [p.kind for p in table.problems if p.model == model]


def test_a_clean_table_has_no_problems(tmp_path: Path) -> None:
    table = read_csv(write(tmp_path, *GOOD), today=TODAY)
    assert table.problems == ()
    assert table.scales == {"MMLU": "fraction"}
    first = table.models[0]
    assert (first.parameters, first.tokens) == (7e9, 1e12)
    assert (first.family, first.released) == ("Fam", date(2023, 2, 24))
    assert first.scores["MMLU"].value == 0.35
    assert first.scores["MMLU"].source.endswith("scores.csv")


def test_columns_are_mapped_and_scaled(tmp_path: Path) -> None:
    file = write(tmp_path, "x-7B,7e9,35.1%", "y-7B,6.9e9,40%", header="Name,Count,EM")
    table = read_csv(file, {"name": "Name", "parameters": "Count", "MMLU": "EM"}, today=TODAY)
    assert table.models[0].parameters == 7e9
    assert table.models[0].scores["MMLU"].value == pytest.approx(0.351)
    assert table.scales == {"MMLU": "percent"}
    assert parse_column("Size * 1e9").factor == 1e9
    assert parse_column("Size (M)").factor == 1e6
    with pytest.raises(ValueError, match="HEADER . FACTOR"):
        parse_column("Size * many")


def test_a_byte_order_mark_and_blank_cells(tmp_path: Path) -> None:
    file = tmp_path / "bom.csv"
    file.write_text("\ufeffModel,MMLU\nx,0.5\ny,\nz,-\n", encoding="utf-8")
    table = read_csv(file, today=TODAY)
    assert [len(m.scores) for m in table.models] == [1, 0, 0]


@pytest.mark.parametrize(
    ("values", "scale", "left_out"),
    [
        (["35", "47", "63"], "percent", []),
        (["0.35", "0.47", "0.63"], "fraction", []),
        (["35", "47", "0.63"], "mixed", ["m2"]),  # 0.63 % or 63 %? nobody can know
        (["0.35", "0.47", "63"], "mixed", ["m2"]),
        (["35%", "0.47", "0.63"], "mixed", []),  # a sign settles it
        (["35", "47", "630"], "percent", ["m2"]),
    ],
)
def test_percent_and_fraction(
    tmp_path: Path, values: list[str], scale: str, left_out: list[str]
) -> None:
    rows = [f"m{i},{v}" for i, v in enumerate(values)]
    table = read_csv(write(tmp_path, *rows, header="model,MMLU"), today=TODAY)
    assert table.scales["MMLU"] == scale
    assert [p.model for p in table.problems if p.excluded] == left_out
    assert [m.name for m in table.models if "MMLU" not in m.scores] == left_out
    assert ("scale" in kinds(table)) == (scale == "mixed")
    for model, wanted in zip(table.models, (0.35, 0.47, 0.63), strict=True):
        if model.scores:
            assert model.scores["MMLU"].value == pytest.approx(wanted)


def test_every_kind_of_bad_row_is_named(tmp_path: Path) -> None:
    rows = [
        *GOOD,
        "c/Chance-7B,C,7,1.0,2023-03-01,0.24",
        "b/New-7B,New,7,2.0,2023-12-01,0.58",  # a second value for the same model
        "d/Future-7B,D,7,1.0,2031-01-01,0.5",
        "e/Mix-8x7B,E,46,1.0,2023-12-11,0.7",  # no active parameters
        "cerebras/btlm-3b-8k-base,BTLM,3,627,2023-07-24,0.28",
        "openlm-research/open_llama_7b_v2,OL,13,1.0,2023-07-06,0.41",
        "f/Odd-7B,F,70,1.0,2023-07-06,0.41",  # the name says another size
        "g/Few-70B,G,70,0.01,2023-07-06,0.41",  # fewer tokens than parameters
        "h/Bad-7B,H,seven,1.0,06/07/2023,n.d.",
        ",X,1,1,2023-01-01,0.4",
    ]
    table = read_csv(write(tmp_path, *rows), today=TODAY)
    assert kinds(table, "c/Chance-7B") == ["chance"]
    assert kinds(table, "b/New-7B") == ["duplicate"]
    assert kinds(table, "d/Future-7B") == ["date"]
    assert kinds(table, "e/Mix-8x7B") == ["active"]
    assert kinds(table, "cerebras/btlm-3b-8k-base") == ["known error"]
    assert kinds(table, "openlm-research/open_llama_7b_v2") == ["known error"]
    assert kinds(table, "f/Odd-7B") == ["suspicious"]
    assert kinds(table, "g/Few-70B") == ["suspicious"]
    assert kinds(table, "h/Bad-7B") == ["value", "date", "value"]
    assert kinds(table, "line 16") == ["name"]
    text = "\n".join(map(str, table.problems))
    assert "MMLU 55.0%, 58.0%; the first is used" in text
    assert "627 billion tokens" in text
    assert "'06/07/2023', not YYYY-MM-DD (left out)" in text
    assert len(without_duplicates(table).models) == len(table.models) - 1

    # And every model is either placed or left out with a reason.
    found = dated_densities(table, Choices(basis="total", anchor="Fam"))
    placed = {p.model.name for p in found.placed}
    reasons = dict(found.left_out)
    assert placed | set(reasons) == {m.name for m in table.models}
    assert not placed & set(reasons)
    assert "too near chance" in reasons["c/Chance-7B"]
    assert reasons["d/Future-7B"] == "release date unknown"
    assert reasons["h/Bad-7B"] == "no score on MMLU"
    active = dated_densities(table, Choices(basis="active", anchor="Fam"))
    assert dict(active.left_out)["e/Mix-8x7B"] == "active parameters unknown"


def test_broken_files_end_with_a_clear_message(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="has no column of model names: it has id, EM"):
        read_csv(write(tmp_path, "1,2", header="id,EM"))
    with pytest.raises(ValueError, match="has no column 'MMLU 5' .for MMLU.: it has model, EM"):
        read_csv(write(tmp_path, "1,2", header="model,EM"), {"MMLU": "MMLU 5"})
    with pytest.raises(ValueError, match="has no rows"):
        read_csv(write(tmp_path))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        read_csv(tmp_path / "binary.csv")
    no_scores = read_csv(write(tmp_path, "x,1", header="model,elo"), today=TODAY)
    assert kinds(no_scores) == ["columns"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta-llama/Llama-2-7b-hf", 7e9),
        ("Qwen2.5-0.5B", 0.5e9),
        ("stablelm-2-1_6b", 1.6e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("Mixtral-8x22B-v0.1", 176e9),
        ("Qwen2-57B-A14B", 57e9),
        ("phi-2", None),
        ("gpt2-xl", None),
    ],
)
def test_sizes_in_names(name: str, size: float | None) -> None:
    assert size_in_name(name) == (None if size is None else pytest.approx(size))


def test_names_and_mixtures() -> None:
    assert plain("meta-llama/Llama-2-7b-hf") == plain("Llama-2-7B")
    assert plain("Qwen1.5-7B") != plain("Qwen-15-7B")
    assert is_sparse_name("Qwen3-30B-A3B-Base") and is_sparse_name("mixtral-8x7b")
    assert not is_sparse_name("Llama-3-8B")
    mixture = Model("Mix-8x7B", parameters=46e9, active_parameters=12e9)
    assert (count(mixture, "total"), count(mixture, "active")) == (46e9, 12e9)
    assert count(Model("Dense-7B", parameters=7e9), "active") == 7e9
    with pytest.raises(ValueError, match="basis must be"):
        Choices(basis="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Choices()  # type: ignore[call-arg]


def test_joining_fills_what_is_missing(tmp_path: Path) -> None:
    file = write(tmp_path, "meta-llama/Llama-2-7b-hf,0.44", "who/Knows-1B,0.3", header="model,MMLU")
    table = read_csv(file, today=TODAY).joined(curated_table())
    llama = table.models[0]
    assert (llama.family, llama.parameters) == ("Llama 2", 7e9)
    assert llama.released == date(2023, 7, 18)
    assert llama.scores["MMLU"].value == 0.44  # its own value stays
    assert any("1 of 2 models are not in" in p.message for p in table.problems)


LM_EVAL = {
    "model_name": "org/Tiny-1B",
    "config": {
        "model_args": "pretrained=org/Tiny-1B,dtype=float32",
        "model_num_parameters": 1100000,
    },
    "n-shot": {"mmlu_abstract_algebra": 5, "gsm8k": 5},
    "group_subtasks": {"mmlu": ["mmlu_abstract_algebra"]},
    "results": {
        "mmlu": {"acc,none": 0.31, "acc_stderr,none": 0.004, "alias": "mmlu"},
        "mmlu_abstract_algebra": {"acc,none": 0.22},
        "gsm8k": {"exact_match,strict-match": 0.02, "exact_match,flexible-extract": 0.05},
        "arc_challenge": {"acc,none": 0.2, "acc_norm,none": 0.25},
        "lambada_openai": {"perplexity,none": 12.0},
    },
}
LIGHTEVAL = {
    "config_general": {"model_name": "org/Old-7B"},
    "results": {
        "harness|arc:challenge|25": {"acc": 0.4, "acc_norm": 0.45},
        "harness|hendrycksTest-anatomy|5": {"acc": 0.30, "acc_norm": 0.9},
        "harness|hendrycksTest-virology|5": {"acc": 0.50},
        "all": {"acc": 0.4},
    },
}


def test_lm_evaluation_harness_results(tmp_path: Path) -> None:
    file = tmp_path / "results_2026-01-01T00-00-00.json"
    file.write_text(json.dumps(LM_EVAL))
    table = read_results(file, today=TODAY)
    (model,) = table.models
    assert model.name == "org/Tiny-1B" and model.parameters == 1100000
    assert model.scores["MMLU"].value == 0.31 and model.scores["MMLU"].shots == 5
    assert model.scores["GSM8K"].value == 0.02 and model.scores["ARC-C"].value == 0.25
    assert [p.message for p in table.problems if p.kind == "task"] == [
        "unknown task 'lambada_openai'"
    ]


def test_lighteval_results_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.json").write_text(json.dumps(LIGHTEVAL))
    (tmp_path / "results_1.json").write_text(json.dumps(LM_EVAL))
    newer = {**LM_EVAL, "results": {"mmlu": {"acc,none": 33.0}}}
    (tmp_path / "results_2.json").write_text(json.dumps(newer))
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    table = read_results(tmp_path, today=TODAY)
    models = {m.name: m for m in table.models}
    old = models["org/Old-7B"]
    assert old.scores["MMLU"].value == pytest.approx(0.4)  # plain accuracy, mean of subjects
    assert old.scores["ARC-C"].value == 0.45 and old.scores["ARC-C"].shots == 25
    assert models["org/Tiny-1B"].scores["MMLU"].value == pytest.approx(0.33)
    found = [p.kind for p in table.problems]
    assert {"partial", "file", "duplicate", "scale"} <= set(found)
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="has no 'results'"):
        read_results(tmp_path / "notes.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_results(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds no results file"):
        (tmp_path / "empty").mkdir()
        read_results(tmp_path / "empty")


def test_the_curated_table_is_consistent() -> None:
    table = curated_table()
    assert len(table.models) >= 100 and sum(len(m.scores) for m in table.models) >= 400
    names = [plain(m.name) for m in table.models]
    assert len(set(names)) == len(names)
    by_name = {m.name for m in table.models}
    for model in table.models:
        assert model.family and model.released and model.parameters
        assert model.active_parameters <= model.parameters
        assert model.parent is None or model.parent in by_name
        assert all(0 < s.value < 1 and s.source for s in model.scores.values()), model.name
        size = size_in_name(model.name)
        if size and "x" not in model.name.split("-")[-2:][0]:
            assert model.parameters == pytest.approx(size, rel=0.4), model.name
    assert {"MMLU", "BBH", "MATH", "GSM8K", "HumanEval", "MBPP"} <= set(table.benchmarks())
    assert max(m.released for m in table.models) >= date(2026, 4, 1)


def test_a_table_without_the_anchor_family_takes_it_from_the_table_that_ships(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("Model,Size (B),Released,MMLU\none,7,2025-03-01,61.5\ntwo,3,2025-09-01,62\n")
    found = dated_densities(read_csv(file), Choices(basis="total"))
    own = {p.model.name: p.density.ratio for p in found.placed}
    shipped = anchor_reference(curated_table(), Choices(basis="total"))
    assert own["one"] == pytest.approx(density(0.615, 7e9, shipped).ratio)
    assert found.reference_name == "LLaMA (from the table that ships)"
    assert dated_densities(curated_table(), Choices(basis="total")).reference_name == "LLaMA"


def test_the_headline_brings_its_sensitivity_table() -> None:
    found = headline(curated_table(), Choices(basis="total"), anchors=["Llama 2"], resamples=100)
    choices = {row.choice for row in found.sensitivity}
    assert choices == {
        "estimator", "bootstrap unit", "without a family", "minimum size", "margin above chance",
        "released until", "parameters", "reference", "benchmark",
    }  # fmt: skip
    own = next(r for r in found.sensitivity if r.choice == "estimator" and r.value == "envelope")
    assert own.doubling_days == pytest.approx(found.trend.doubling_days)
    assert found.range[0] <= found.trend.doubling_days <= found.range[1]
    code = next(r for r in found.sensitivity if r.value.startswith("HumanEval"))
    assert "Llama 2" in code.value  # LLaMA has no sourced HumanEval: the next anchor is used
    text = table_text(found)
    assert "by other choices" in text and "least_squares" in text and "corr(ln density" in text
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="no family 'Nobody' .* it has"):
        headline(curated_table(), Choices(basis="total", anchor="Nobody"))
    with pytest.raises(ValueError, match="unknown benchmark 'IQ'"):
        headline(curated_table(), Choices(basis="total", benchmark="IQ"))

"""fastText's files: quantised, pruned, damaged."""

from __future__ import annotations

from pathlib import Path

import fasttext
import numpy as np
import pytest

from ultraclean import Scorer, convert
from ultraclean.library import predict
from ultraclean.model_file import read


@pytest.fixture(scope="module")
def lines(prose: list[str], shuffled: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "train.txt"
    path.write_text(
        "".join(f"__label__hq {' '.join(t.split())}\n" for t in prose[:500])
        + "".join(f"__label__cc {' '.join(t.split())}\n" for t in shuffled[:500])
    )
    return path


def trained(lines: Path, **settings):
    chosen = {"dim": 13, "bucket": 20_000, "minCount": 2, "lr": 0.5, "wordNgrams": 3,
              "minn": 0, "maxn": 0, "verbose": 0, "thread": 1, **settings}  # fmt: skip
    return fasttext.train_supervised(str(lines), **chosen)


@pytest.mark.parametrize(
    "how",
    [None, {}, {"qnorm": True}, {"cutoff": 3000}, {"cutoff": 400, "qnorm": True, "dsub": 3}],
    ids=str,
)
def test_a_foreign_model_scores_as_the_library_says(
    how: dict | None, lines: Path, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    model = trained(lines)
    if how is not None:
        model.quantize(input=str(lines), **how)
    path = tmp_path / ("model.bin" if how is None else "model.ftz")
    model.save_model(str(path))
    ours = convert(path, tmp_path / "c", "whitespace", positive="__label__hq", keep_model=True)
    texts = [" ".join(t.split()) for t in [*prose, *shuffled]] + ["", "unseen zzz", "</s> x"]
    theirs = predict(model, texts, "__label__hq")
    assert 0.1 < theirs.mean() < 0.9 and theirs.std() > 0.05
    assert np.abs(ours.score(texts) - theirs).max() < 1e-5
    plain = Scorer.load(ours.folder, 3, "numpy")
    assert np.abs(plain.score(texts) - theirs).max() < 1e-5
    if how is None:
        assert ours.score(texts, exact=True).tolist() == theirs.tolist()
        assert ours.score(texts, backend="reference").tolist() == theirs.tolist()
    else:
        with pytest.raises(FileNotFoundError, match="model.bin does not exist"):
            ours.score(texts, exact=True)


def test_matrices_are_the_library_s(lines: Path, tmp_path: Path) -> None:
    model = trained(lines)
    model.save_model(str(tmp_path / "m.bin"))
    found = read(tmp_path / "m.bin")
    assert found.words == [w.encode() for w in model.get_words()]
    assert found.labels == model.get_labels()
    assert (found.inputs.rows(0, found.inputs.shape[0]) == model.get_input_matrix()).all()
    assert (found.outputs == model.get_output_matrix()).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hs"}, "train one with softmax"),
        ({"loss": "ova"}, "train one with softmax"),
        ({"maxn": 3, "minn": 2}, "character n-grams"),
    ],
)
def test_what_cannot_be_collapsed_is_refused(
    settings: dict, message: str, lines: Path, tmp_path: Path
) -> None:
    trained(lines, **settings).save_model(str(tmp_path / "m.bin"))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "m.bin", tmp_path / "c", "whitespace", positive="__label__hq")
    with pytest.raises(ValueError, match=r"labels __label__.*--positive"):
        convert(tmp_path / "m.bin", tmp_path / "c", "whitespace")


def test_damaged_files_are_refused(lines: Path, tmp_path: Path) -> None:
    trained(lines).save_model(str(tmp_path / "m.bin"))
    whole = (tmp_path / "m.bin").read_bytes()
    for cut in (0, 3, 50, 100, 1000, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut short"):
            read(tmp_path / "cut.bin")
    (tmp_path / "text.bin").write_text("no model at all, but long enough " * 10)
    with pytest.raises(ValueError, match="no fastText model of version"):
        read(tmp_path / "text.bin")
    with pytest.raises(FileNotFoundError, match="give a fastText model"):
        read(tmp_path / "nothing.bin")

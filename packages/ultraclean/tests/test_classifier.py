from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ultraclean import Classifier, ClassifierConfig, train
from ultraclean._files import sha256

SMALL = ClassifierConfig(dim=8, bucket=20_000, min_count=3, lr=0.5)  # as the fixture classifier


def test_same_seed_same_bytes_and_another_seed_others(
    prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        train(prose[:200], shuffled[:150], SMALL, tmp_path / name)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    train(prose[:200], shuffled[:150], replace(SMALL, seed=1), tmp_path / "c")
    assert sha256(tmp_path / "a" / "model.bin") != sha256(tmp_path / "c" / "model.bin")


def test_classes_are_balanced(prose: list[str], shuffled: list[str], tmp_path: Path) -> None:
    made = train(prose[:300], [*shuffled[:100], "", " \n "], SMALL, tmp_path / "x")
    assert made.manifest["texts"] == {"pos": 300, "neg": 100}
    assert made.manifest["texts_used"] == {"pos": 100, "neg": 100}


def test_tells_good_from_bad_on_text_it_never_saw(
    classifier: Classifier, prose: list[str], shuffled: list[str]
) -> None:
    assert (
        classifier.score(prose[1::2]).mean() > 0.7 > 0.3 > classifier.score(shuffled[1::2]).mean()
    )


def test_backends_agree(classifier: Classifier, prose: list[str]) -> None:
    ours, theirs = classifier.score(prose[:50]), classifier.score(prose[:50], backend="reference")
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        classifier.score([], backend="gpu")
    assert classifier.score([]).shape == (0,)


def test_a_damaged_folder_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(classifier.folder, folder)
    words = (folder / "words.txt").read_bytes()
    (folder / "words.txt").write_bytes(words[:-5])
    with pytest.raises(ValueError, match=r"words.txt changed since training"):
        Classifier.load(folder)
    (folder / "words.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"words.txt is missing"):
        Classifier.load(folder)
    (folder / "words.txt").write_bytes(words)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is broken"):
        Classifier.load(folder)
    with pytest.raises(FileNotFoundError, match="is not a classifier"):
        Classifier.load(tmp_path / "nowhere")


def test_another_tokenizer_is_refused(
    prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        prose[:50], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    config = ClassifierConfig(
        dim=4, bucket=1000, min_count=1, normaliser="ultrafine", tokenizer=str(path)
    )
    before = train(prose[:50], shuffled[:50], config, tmp_path / "bpe").score(prose[:5])
    path.unlink()  # the folder has its own
    assert (Classifier.load(tmp_path / "bpe").score(prose[:5]) == before).all()
    own = tmp_path / "bpe" / "tokenizer.json"
    own.write_text(own.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer.json changed since training"):
        Classifier.load(tmp_path / "bpe")


def test_a_normaliser_that_works_differently_now_is_refused(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultraclean import normalise

    monkeypatch.setitem(normalise._PLAIN, "ultrafine-words", str.upper)
    with pytest.raises(ValueError, match="'ultrafine-words' that works differently"):
        Classifier.load(classifier.folder)


def test_labels_and_ends_in_a_text_do_not_reach_the_trainer(tmp_path: Path) -> None:
    config = ClassifierConfig(dim=4, bucket=100, min_count=1, lr=0.5, normaliser="dclm")
    plain = train(["a b c"] * 9, ["d e f"] * 9, config, tmp_path / "plain")
    soiled = train(
        ["a __label__neg b __label__other c </s> d e f"] * 9,
        ["d\ne\tf\0</s>\n__label__pos a"] * 9,
        config,
        tmp_path / "soiled",
    )
    assert sha256(soiled.folder / "model.bin") == sha256(plain.folder / "model.bin")


def test_training_and_scoring_cut_words_alike(tmp_path: Path) -> None:
    # To fastText U+00A0 and U+0085 are letters; to Python's split they are spaces.
    config = ClassifierConfig(dim=4, bucket=100, min_count=1, normaliser="whitespace")
    for name in ("dclm", "ultrafine-words", "zh-char"):
        made = train(
            ["a\u00a0b c\x85d"] * 9, ["x y"] * 9,
            ClassifierConfig(**{**config.to_dict(), "normaliser": name}), tmp_path / name,
        )  # fmt: skip
        words = made.normaliser("a\u00a0b c\x85d").encode().split(b" ")
        assert set(words) <= set(made.scorer.words), name


def test_reference_backend_checks_and_may_miss_its_model(
    classifier: Classifier, prose: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(classifier.folder, folder)
    (folder / "model.bin").write_bytes(b"other")
    copy = Classifier.load(folder)
    with pytest.raises(ValueError, match=r"model.bin changed since training"):
        copy.score(prose[:1], backend="reference")
    (folder / "model.bin").unlink()
    assert (Classifier.load(folder).score(prose[:9]) == classifier.score(prose[:9])).all()
    with pytest.raises(FileNotFoundError, match=r"model.bin does not exist"):
        copy.score(prose[:1], backend="reference")


def test_every_row_is_initialised_with_one_thread(prose: list[str], tmp_path: Path) -> None:
    """Older fastText left nine tenths of the matrix at zero; seeds would not be repeatable."""
    import fasttext

    made = train(prose[:50], prose[50:100], replace(SMALL, trainer="fasttext"), tmp_path / "x")
    rows = fasttext.load_model(str(made.folder / "model.bin")).get_input_matrix()
    assert (rows != 0).any(axis=1).all()


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ([], ["x"], "no positive text"),
        (["x"], ["", " "], "no negative text"),
        (["x"], ["y"], "min_count"),
    ],
)
def test_too_little_text_is_an_error(good, bad, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(good, bad, ClassifierConfig(dim=2, bucket=10), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_manifest_records_the_configuration(classifier: Classifier) -> None:
    manifest = json.loads((classifier.folder / "manifest.json").read_text())
    assert manifest["config"] == SMALL.to_dict()
    assert ClassifierConfig.from_dict(manifest["config"]) == SMALL
    assert manifest["library"] is None


def test_the_library_trains_too(prose: list[str], shuffled: list[str], tmp_path: Path) -> None:
    config = replace(SMALL, trainer="fasttext")
    for name in ("a", "b"):
        made = train(prose[:200], shuffled[:150], config, tmp_path / name)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert "fasttext" in made.manifest["library"]
    with pytest.raises(ValueError, match="no word comes 3 times"):
        train(["x"], ["y"], config, tmp_path / "c")
    with pytest.raises(ValueError, match=r"diverged with lr=1e\+38: lower lr"):
        train(prose[:20], prose[20:40], replace(config, lr=1e38), tmp_path / "c")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dim": 0}, r"dim must be at least 1 .* got 0"),
        ({"dim": 2.5}, r"dim must be a whole number, got 2.5"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"normaliser": "x"}, "unknown normaliser 'x'"),
        ({"trainer": "x"}, "unknown trainer 'x'"),
        ({"word_ngrams": 17}, "word_ngrams must be at most 16"),
        ({"normaliser": "ultrafine"}, "needs tokenizer=PATH"),
        ({"tokenizer": "t.json"}, "takes no tokenizer"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**setting)


def test_unknown_setting() -> None:
    with pytest.raises(ValueError, match="width: no setting"):
        ClassifierConfig.from_dict({"width": 3})


def test_divergence_is_the_users_to_mend(prose: list[str], tmp_path: Path) -> None:
    config = ClassifierConfig(dim=4, bucket=10, min_count=1, lr=1e38)
    with pytest.raises(ValueError, match=r"diverged with lr=1e\+38: lower lr"):
        train(prose[:20], prose[20:40], config, tmp_path / "x")
    assert not list(tmp_path.iterdir())

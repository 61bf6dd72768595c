from __future__ import annotations

import json
import shutil
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
    train(
        prose[:200],
        shuffled[:150],
        ClassifierConfig(**{**SMALL.to_dict(), "seed": 1}),
        tmp_path / "c",
    )
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
    train(prose[:50], shuffled[:50], config, tmp_path / "bpe")
    assert 0 <= Classifier.load(tmp_path / "bpe").score(["hello"])[0] <= 1
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        Classifier.load(tmp_path / "bpe")


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
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        ClassifierConfig(dim=0)

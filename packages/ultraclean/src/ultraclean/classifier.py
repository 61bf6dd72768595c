"""Train a fastText quality classifier, keep it in a folder, score text with it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ultraclean._files import atomic_path, sha256, write_json
from ultraclean.config import ClassifierConfig
from ultraclean.normalise import Normaliser
from ultraclean.scorer import Scorer, collapse

if TYPE_CHECKING:
    from fasttext.FastText import _FastText

Backend = Literal["auto", "collapsed", "reference"]
_FILES = ("model.bin", "scalars.npy", "words.txt")


def train(
    positives: Iterable[str],
    negatives: Iterable[str],
    config: ClassifierConfig,
    output: str | os.PathLike[str],
) -> Classifier:
    """Train on good and bad text and write a classifier folder, atomically.

    The larger class is cut to the size of the smaller by a draw with the configuration's seed.
    With `threads=1` the same text and configuration give the same bytes.

    Args:
        positives: raw texts of the kind to keep.
        negatives: raw texts of the kind to drop.
        config: how to train.
        output: the folder to write; replaced if it exists.

    Raises:
        ValueError: a class without a text, or words too rare for `min_count`.
        ImportError: fastText is not installed.
    """
    normaliser = Normaliser(config.normaliser, config.tokenizer)
    draw = random.Random(config.seed)
    classes = {"pos": _prepare(positives, normaliser), "neg": _prepare(negatives, normaliser)}
    for label, texts in classes.items():
        if not texts:
            raise ValueError(f"no {label}itive text to learn from" if label == "pos" else
                             "no negative text to learn from")  # fmt: skip
    size = min(map(len, classes.values()))
    lines = [
        f"__label__{label} {text}"
        for label, texts in classes.items()
        for text in (draw.sample(texts, size) if len(texts) > size else texts)
    ]
    draw.shuffle(lines)
    with atomic_path(output) as folder:
        folder.mkdir()
        model = _fit(lines, config)
        model.save_model(str(folder / "model.bin"))
        _collapsed(model, config.word_ngrams).save(folder)
        write_json(
            folder / "manifest.json",
            {
                "format": 1,
                "config": config.to_dict(),
                "tokenizer_sha256": normaliser.tokenizer_hash,
                "texts": {label: len(texts) for label, texts in classes.items()},
                "texts_used": {label: size for label in classes},
                "library": _library_version(),
                "files": {name: sha256(folder / name) for name in _FILES},
            },
        )
    return Classifier.load(output)


def _prepare(texts: Iterable[str], normaliser: Normaliser) -> list[str]:
    """Normalised texts on one line each; empty ones teach nothing and are left out."""
    return [" ".join(normaliser(text).split()) for text in texts if text.strip()]


def _fit(lines: Sequence[str], config: ClassifierConfig) -> _FastText:
    fasttext = _fasttext()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "seeds.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        model = fasttext.train_supervised(
            str(path),
            dim=config.dim,
            lr=config.lr,
            wordNgrams=config.word_ngrams,
            minCount=config.min_count,
            epoch=config.epochs,
            bucket=config.bucket,
            thread=config.threads,
            seed=config.seed,
            minn=0,
            maxn=0,
            loss="softmax",
            verbose=0,
        )
    if not model.get_words(on_unicode_error="replace"):
        raise ValueError(
            f"no word comes {config.min_count} times in the {len(lines)} seeds: give more seeds, "
            "or lower min_count"
        )
    return model


def _collapsed(model: _FastText, ngrams: int) -> Scorer:
    labels = model.get_labels()
    outputs = model.get_output_matrix()
    positive, negative = (outputs[labels.index(f"__label__{n}")] for n in ("pos", "neg"))
    words = [w.encode("utf-8", "replace") for w in model.get_words(on_unicode_error="replace")]
    return Scorer(collapse(model.get_input_matrix(), positive, negative), words, ngrams)


def _fasttext():  # noqa: ANN202 - a module
    try:
        import fasttext
    except ImportError as error:
        raise ImportError(
            "training and the reference backend need fastText: pip install fasttext-community"
        ) from error
    return fasttext


def _library_version() -> str:
    import importlib.metadata

    return f"fasttext-community {importlib.metadata.version('fasttext-community')}"


class Classifier:
    """A trained classifier.

    Args:
        folder: what `train` wrote.

    Attributes:
        config: how it was trained.
        manifest: what is known about it.
        scorer: the table of scalars.
    """

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.folder = folder
        self.manifest = manifest
        known = {f.name for f in fields(ClassifierConfig)}
        self.config = ClassifierConfig(
            **{k: v for k, v in manifest["config"].items() if k in known}
        )
        self.normaliser = Normaliser(self.config.normaliser, self.config.tokenizer)
        if self.normaliser.tokenizer_hash != manifest["tokenizer_sha256"]:
            raise ValueError(
                f"{folder} was trained with another tokenizer than {self.config.tokenizer} now is: "
                "its scores would mean nothing; restore that file or train again"
            )
        self.scorer = Scorer.load(folder, self.config.word_ngrams)
        self._model: _FastText | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Classifier:
        """Open a classifier folder; the table is memory-mapped, fastText is not needed.

        Raises:
            FileNotFoundError: no such folder, or a file is missing from it.
            ValueError: a broken manifest, a damaged table, or another tokenizer.
        """
        path = Path(folder)
        for name in ("manifest.json", *_FILES):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f"{path} is not a classifier: {name} is missing; make one with ultraclean train"
                )
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            damaged = [
                n for n in _FILES[1:] if sha256(path / n) != manifest["files"][n]
            ]  # the model itself may be gigabytes, and scoring does not read it
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}/manifest.json is broken ({error}): train again") from None
        if damaged:
            raise ValueError(f"{path}: {', '.join(damaged)} changed since training: train again")
        return cls(path, manifest)

    def score(self, texts: Iterable[str], backend: Backend = "auto") -> np.ndarray:
        """P(good) of raw texts, fp32 `[texts]`, after the classifier's own normalisation.

        Args:
            texts: raw texts, of any kind and length.
            backend: `collapsed`, the table of scalars; `reference`, fastText's own prediction
                (needs the whole model in memory); `auto` takes `collapsed`.

        Raises:
            ValueError: unknown backend.
        """
        if backend not in ("auto", "collapsed", "reference"):
            raise ValueError(f"unknown backend {backend!r}: auto, collapsed or reference")
        words = (" ".join(self.normaliser(text).split("\n")) for text in texts)
        if backend != "reference":
            return self.scorer.score(words)
        if self._model is None:
            self._model = _fasttext().load_model(str(self.folder / "model.bin"))
        return np.fromiter((predict(self._model, text) for text in words), dtype=np.float32)

    @property
    def identity(self) -> str:
        """Hash of what decides a score: table, vocabulary, normaliser."""
        facts = json.dumps([self.manifest["files"], self.manifest["config"]["normaliser"],
                            self.manifest["tokenizer_sha256"]], sort_keys=True)  # fmt: skip
        return hashlib.sha256(facts.encode()).hexdigest()


def predict(model: _FastText, text: str) -> float:
    """P(__label__pos) by fastText itself, of one line of normalised text."""
    labels, shares = model.predict([text], k=2)
    found = dict(zip(labels[0], shares[0], strict=True))
    return min(1.0, float(found["__label__pos"])) if found else 0.5

"""A quality classifier in its folder: made of a fastText model, opened, asked for scores."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ultraclean import library, model_file
from ultraclean._files import atomic_path, sha256, write_json
from ultraclean.collapsing import table_of
from ultraclean.config import ClassifierConfig
from ultraclean.normalise import Normaliser
from ultraclean.scorer import Scorer

if TYPE_CHECKING:
    from fasttext.FastText import _FastText

Backend = Literal["auto", "collapsed", "reference"]
MODEL, _TABLE, _TOKENIZER = "model.bin", ("scalars.npy", "words.txt"), "tokenizer.json"


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    normaliser: str,
    tokenizer: str | None = None,
    *,
    positive: str = library.LABELS[0],
    keep_model: bool = False,
) -> Classifier:
    """Make a classifier folder of any two-label fastText model, .bin or .ftz; needs no fastText.

    Args:
        model: the fastText file.
        output: the folder to write; replaced if it exists.
        normaliser, tokenizer: how the model's training text was made into words. Nothing in the
            file says it, and with another one its scores mean nothing.
        positive: its label of good text.
        keep_model: copy a .bin into the folder, for `exact` and the reference backend.

    Raises:
        FileNotFoundError: no such model or tokenizer.
        ValueError: it is none that can be collapsed; see `collapsing.table_of`.
    """
    found = model_file.read(model)
    others = [label for label in found.labels if label != positive]
    if positive not in found.labels or len(found.labels) != 2:
        raise ValueError(
            f"{model} has the labels {', '.join(found.labels[:5])}: expected two, with the good "
            f"text's, {positive!r}, among them (--positive)"
        )
    table = table_of(found, positive, others[0])
    settings = found.settings
    config = ClassifierConfig(
        dim=settings["dim"], word_ngrams=settings["word_ngrams"], bucket=max(1, settings["bucket"]),
        min_count=max(1, settings["min_count"]), epochs=settings["epoch"], normaliser=normaliser,
        tokenizer=tokenizer, trainer="fasttext",
    )  # fmt: skip
    words = b"".join(word + b"\n" for word in found.words)
    with atomic_path(output) as folder:
        folder.mkdir()
        dense = isinstance(found.inputs, model_file.DenseMatrix)
        if keep_model and dense and found.pruned is None:
            shutil.copyfile(model, folder / MODEL)
        Scorer(table, words, config.word_ngrams).save(folder)
        finish(folder, config, {"converted_from": sha256(model), "positive": positive,
                                 "labels": found.labels})  # fmt: skip
    return Classifier.load(output)


def finish(folder: Path, config: ClassifierConfig, facts: dict[str, Any]) -> None:
    """The tokenizer's copy and the manifest, last of a folder's files."""
    normaliser = Normaliser(config.normaliser, config.tokenizer)
    if config.tokenizer is not None:
        shutil.copyfile(config.tokenizer, folder / _TOKENIZER)
    write_json(
        folder / "manifest.json",
        {
            "format": 1,
            "config": config.to_dict(),
            "tokenizer_sha256": normaliser.tokenizer_hash,
            "normaliser_fingerprint": normaliser.fingerprint,
            **facts,
            "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        },
    )


class Classifier:
    """A trained classifier; open one with `Classifier.load`.

    Attributes:
        folder: where it lies.
        config: how it was trained.
        manifest: all that is known about it.
        normaliser: makes raw text into its words.
        scorer: the table of scalars, for text that is normalised already.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.config = ClassifierConfig.from_dict(manifest["config"])
        tokenizer = None if self.config.tokenizer is None else folder / _TOKENIZER
        self.normaliser = Normaliser(self.config.normaliser, tokenizer)
        if self.normaliser.fingerprint != manifest["normaliser_fingerprint"]:
            raise ValueError(
                f"{folder} was trained with a normaliser {self.config.normaliser!r} that works "
                "differently from this one (another version of ultraclean, or of Python's Unicode "
                "tables): its scores would mean nothing; train again"
            )
        self.scorer = Scorer.load(folder, self.config.word_ngrams)
        self._model: _FastText | None = None
        self._matrices: tuple[np.ndarray, np.ndarray, int] | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Classifier:
        """Open a classifier folder; the table is memory-mapped, fastText is not needed.

        `model.bin` may be missing: only the backend `reference` reads it.

        Raises:
            FileNotFoundError: no such folder, or a file is missing from it.
            ValueError: a broken manifest, a file changed since training, or a normaliser that no
                longer does what it did when the classifier was trained.
        """
        path = Path(folder)
        for name in ("manifest.json", *_TABLE):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f"{path} is not a classifier: {name} is missing; make one with ultraclean train"
                )
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != 1:
                raise ValueError(f"format {manifest['format']}, this version reads 1")
            # The model may be gigabytes, and scoring does not read it: checked when it is.
            for name in manifest["files"].keys() - {MODEL}:
                _check(path / name, manifest["files"][name])
            return cls(path, manifest)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}/manifest.json is broken ({error}): train again") from None

    def score(
        self, texts: Iterable[str], backend: Backend = "auto", *, exact: bool = False
    ) -> np.ndarray:
        """P(good) of raw texts, fp32 `[texts]`, after the classifier's own normalisation.

        Args:
            texts: raw texts, of any kind and length.
            exact: fastText's score to the last bit, from the whole model, which is mapped from
                `model.bin`; slower by the width of the model.
            backend: `collapsed`, the table of scalars; `reference`, fastText's own prediction
                (needs the library and the whole model in memory); `auto` takes `collapsed`,
                whose scores do not depend on what is installed.

        Raises:
            ValueError: unknown backend, or `model.bin` changed since training.
            FileNotFoundError: the reference backend without `model.bin`.
        """
        if backend not in ("auto", "collapsed", "reference"):
            raise ValueError(f"unknown backend {backend!r}: auto, collapsed or reference")
        if exact:
            return self._exact(map(self.normaliser, texts))
        if backend != "reference":
            return self.scorer.score_raw(texts, self.normaliser)[0]
        words = map(self.normaliser, texts)
        if self._model is None:
            self._model = library.load(self._whole_model("the backend reference"))
        return library.predict(self._model, words, self._positive)

    @property
    def _positive(self) -> str:
        return self.manifest.get("positive", library.LABELS[0])

    def _whole_model(self, who: str) -> Path:
        path = self.folder / MODEL
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {who} needs it; restore it, or use backend='collapsed'"
            )
        _check(path, self.manifest["files"][MODEL])
        return path

    def _exact(self, words: Iterable[str]) -> np.ndarray:
        if self._matrices is None:
            model = model_file.read(self._whole_model("an exact score"))
            if not isinstance(model.inputs, model_file.DenseMatrix):
                raise ValueError(
                    f"{self.folder / MODEL} is quantised (.ftz): an exact score needs the dense "
                    "model it was made from; leave exact out"
                )
            column = model.labels.index(self._positive)
            self._matrices = model.inputs.values, model.outputs, column
        inputs, outputs, column = self._matrices
        shares = self.scorer.exact(words, inputs, outputs)[:, column]
        return np.where(np.isnan(shares), np.float32(0.5), np.minimum(shares, np.float32(1)))

    @property
    def identity(self) -> str:
        """Hash of what decides a score: table, vocabulary, normaliser."""
        files = self.manifest["files"]
        facts = [files.get(name) for name in (*_TABLE, _TOKENIZER)]
        facts += [self.manifest["normaliser_fingerprint"], self.config.word_ngrams]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check(path: Path, expected: str) -> None:
    if not path.is_file() or sha256(path) != expected:
        raise ValueError(f"{path} changed since training: restore it, or train again")

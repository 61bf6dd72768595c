"""Train a fastText quality classifier, keep it in a folder, score text with it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ultraclean import library
from ultraclean._files import atomic_path, sha256, write_json
from ultraclean.config import ClassifierConfig
from ultraclean.normalise import Normaliser
from ultraclean.reference import END, tokens
from ultraclean.scorer import Scorer, collapse

if TYPE_CHECKING:
    from fasttext.FastText import _FastText

Backend = Literal["auto", "collapsed", "reference"]
_MODEL, _TABLE, _TOKENIZER = "model.bin", ("scalars.npy", "words.txt"), "tokenizer.json"


def train(
    positives: Iterable[str],
    negatives: Iterable[str],
    config: ClassifierConfig,
    output: str | os.PathLike[str],
) -> Classifier:
    """Train on good and bad text and write a classifier folder, atomically.

    The larger class is cut to the size of the smaller by a draw with the configuration's seed.
    With `threads=1` the same text and configuration give the same bytes.

    The folder holds `model.bin` (fastText's, needed only by the reference backend), `scalars.npy`
    and `words.txt` (the collapsed table), `tokenizer.json` if the normaliser has one, and
    `manifest.json`.

    Args:
        positives: raw texts of the kind to keep.
        negatives: raw texts of the kind to drop.
        config: how to train.
        output: the folder to write; replaced if it exists.

    Raises:
        ValueError: a class without a text, words too rare for `min_count`, or updates that diverge.
        ImportError: fastText is not installed.
    """
    normaliser = Normaliser(config.normaliser, config.tokenizer)
    draw = random.Random(config.seed)
    classes = {"pos": _prepare(positives, normaliser), "neg": _prepare(negatives, normaliser)}
    for label, texts in classes.items():
        if not texts:
            raise ValueError(f"no {'positive' if label == 'pos' else 'negative'} text to learn "
                             "from: each class needs at least one with a word in it")  # fmt: skip
    size = min(map(len, classes.values()))
    lines = [
        f"__label__{label} {text}"
        for label, texts in classes.items()
        for text in (draw.sample(texts, size) if len(texts) > size else texts)
    ]
    draw.shuffle(lines)
    with atomic_path(output) as folder:
        folder.mkdir()
        model = library.fit(lines, config, folder / "seeds.txt")
        model.save_model(str(folder / _MODEL))
        _collapsed(model, config.word_ngrams).save(folder)
        if config.tokenizer is not None:
            shutil.copyfile(config.tokenizer, folder / _TOKENIZER)
        write_json(
            folder / "manifest.json",
            {
                "format": 1,
                "config": config.to_dict(),
                "tokenizer_sha256": normaliser.tokenizer_hash,
                "normaliser_fingerprint": normaliser.fingerprint,
                "texts": {label: len(texts) for label, texts in classes.items()},
                "texts_used": {label: size for label in classes},
                "library": library.version(),
                "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
            },
        )
    return Classifier.load(output)


def _prepare(texts: Iterable[str], normaliser: Normaliser) -> list[str]:
    """The words that scoring would see of each text; texts without one teach nothing.

    A `__label__x` in a text would otherwise become a label of its line, even a new class, and the
    library would read what follows a `</s>` as a line without a label.
    """
    lines = (
        b" ".join(w for w in tokens(normaliser(text)) if w != END).decode()
        for text in texts
        if text.strip()  # or an empty page would teach the word that a newline becomes
    )
    return [line for line in lines if line]


def _collapsed(model: _FastText, ngrams: int) -> Scorer:
    labels = model.get_labels()
    outputs = model.get_output_matrix()
    positive, negative = (outputs[labels.index(label)] for label in library.LABELS)
    words = [w.encode("utf-8", "replace") for w in model.get_words(on_unicode_error="replace")]
    return Scorer(collapse(model.get_input_matrix(), positive, negative), words, ngrams)


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
            for name in manifest["files"].keys() - {_MODEL}:
                _check(path / name, manifest["files"][name])
            return cls(path, manifest)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}/manifest.json is broken ({error}): train again") from None

    def score(self, texts: Iterable[str], backend: Backend = "auto") -> np.ndarray:
        """P(good) of raw texts, fp32 `[texts]`, after the classifier's own normalisation.

        Args:
            texts: raw texts, of any kind and length.
            backend: `collapsed`, the table of scalars; `reference`, fastText's own prediction
                (needs the library and the whole model in memory); `auto` takes `collapsed`,
                whose scores do not depend on what is installed.

        Raises:
            ValueError: unknown backend, or `model.bin` changed since training.
            FileNotFoundError: the reference backend without `model.bin`.
        """
        if backend not in ("auto", "collapsed", "reference"):
            raise ValueError(f"unknown backend {backend!r}: auto, collapsed or reference")
        words = map(self.normaliser, texts)
        if backend != "reference":
            return self.scorer.score(words)
        if self._model is None:
            if not (self.folder / _MODEL).is_file():
                raise FileNotFoundError(
                    f"{self.folder / _MODEL} does not exist: the backend reference needs it; "
                    "restore it, or use backend='collapsed'"
                )
            _check(self.folder / _MODEL, self.manifest["files"][_MODEL])
            self._model = library.load(self.folder / _MODEL)
        return library.predict(self._model, words)

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

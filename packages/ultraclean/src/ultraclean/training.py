"""Train a quality classifier on good and bad text and keep it in a folder."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ultraclean import library, model_file, native, width_one
from ultraclean._files import atomic_path
from ultraclean.classifier import MODEL, Classifier, finish
from ultraclean.collapsing import table_of
from ultraclean.config import ClassifierConfig
from ultraclean.normalise import Normaliser
from ultraclean.reference import END, tokens
from ultraclean.scorer import Scorer, batches


def train(
    positives: Iterable[str],
    negatives: Iterable[str],
    config: ClassifierConfig,
    output: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Classifier:
    """Train on good and bad text and write a classifier folder, atomically.

    The larger class is cut to the size of the smaller by a draw with the configuration's seed.
    The same text and configuration give the same bytes (of the fastText library: with `threads=1`).
    The native trainer, interrupted, goes on where it was: it leaves `.<output>.training` behind.

    The folder holds `model.bin` (fastText's, needed only by the reference backend), `scalars.npy`
    and `words.txt` (the collapsed table), `tokenizer.json` if the normaliser has one, and
    `manifest.json`.

    Args:
        positives: raw texts of the kind to keep.
        negatives: raw texts of the kind to drop.
        config: how to train.
        output: the folder to write; replaced if it exists.
        progress: called with (words learned from, of how many); the library says nothing.

    Raises:
        ValueError: a class without a text, words too rare for `min_count`, or updates that diverge.
        ImportError: the trainer is `fasttext`, and it is not installed.
    """
    normaliser = Normaliser(config.normaliser, config.tokenizer)
    draw = random.Random(config.seed)
    classes = {"pos": _prepare(positives, normaliser), "neg": _prepare(negatives, normaliser)}
    for label, texts in classes.items():
        if not texts:
            raise ValueError(f"no {'positive' if label == 'pos' else 'negative'} text to learn "
                             "from: each class needs at least one with a word in it")  # fmt: skip
    texts_found = {label: len(texts) for label, texts in classes.items()}
    size = min(texts_found.values())
    seeds = [
        (text, label == "pos")
        for label, texts in classes.items()
        for text in (draw.sample(texts, size) if len(texts) > size else texts)
    ]
    draw.shuffle(seeds)
    documents, good = [text for text, _ in seeds], [is_good for _, is_good in seeds]
    del classes, seeds
    with atomic_path(output) as folder:
        folder.mkdir()
        if config.trainer == "native":
            _natively(documents, good, config, Path(output), folder, progress)
        else:
            model = library.fit(documents, good, config, folder / "seeds.txt")
            model.save_model(str(folder / MODEL))
            del model  # gigabytes: what follows maps the file
        made = model_file.read(folder / MODEL)
        words = b"".join(word + b"\n" for word in made.words)
        Scorer(table_of(made, *library.LABELS), words, config.word_ngrams).save(folder)
        finish(folder, config, {
            "texts": texts_found,
            "texts_used": {label: size for label in texts_found},
            "library": library.version() if config.trainer == "fasttext" else None,
        })  # fmt: skip
    return Classifier.load(output)


def _natively(
    documents: list[bytes],
    good: list[bool],
    config: ClassifierConfig,
    output: Path,
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Train with `width_one` and write its `.bin`, which has one column."""
    kept = output.parent / f".{output.name}.training"
    made = width_one.fit(documents, good, config, kept, progress)
    settings = {
        "dim": 1, "ws": 5, "epoch": config.epochs, "min_count": config.min_count, "neg": 5,
        "word_ngrams": config.word_ngrams, "loss": model_file.SOFTMAX,
        "model": model_file.SUPERVISED, "bucket": config.bucket, "minn": 0, "maxn": 0,
        "lr_update_rate": 100,
    }  # fmt: skip
    half = len(documents) // 2
    model_file.write(
        folder / MODEL,
        model_file.ModelFile(
            settings, made.words, list(library.LABELS), None,
            model_file.DenseMatrix(made.table[:, None]),
            np.array([[made.output / 2], [-made.output / 2]], np.float32), [half, half],
        ),
        made.counts,
    )  # fmt: skip


def _prepare(texts: Iterable[str], normaliser: Normaliser) -> list[bytes]:
    """The words that scoring would see of each text, UTF-8; texts without one teach nothing.

    A `__label__x` in a text would otherwise become a label of its line, even a new class, and the
    library would read what follows a `</s>` as a line without a label.
    """
    library, _ = native.library()
    # An empty page would teach the word that a newline becomes.
    kept = (text for text in texts if text.strip())
    lines: list[bytes] = []
    for batch in batches(kept):
        if library is None or normaliser.tokenizer is not None:
            found: list[bytes | None] = [None] * len(batch)
        else:
            documents = [text.encode("utf-8", "replace") for text in batch]
            found = library.words(documents, normaliser.fold.args, normaliser.fold.expansion)
        lines += [_plainly(text, normaliser) if line is None else line
                  for text, line in zip(batch, found, strict=True)]  # fmt: skip
    return [line for line in lines if line]


def _plainly(text: str, normaliser: Normaliser) -> bytes:
    return b" ".join(word for word in tokens(normaliser(text)) if word != END)

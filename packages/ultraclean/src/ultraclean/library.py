"""What needs the fastText library itself: training, and its own prediction as the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultraclean.config import ClassifierConfig

if TYPE_CHECKING:
    from fasttext.FastText import _FastText

LABELS = ("__label__pos", "__label__neg")


def fit(
    documents: Sequence[bytes], good: Sequence[bool], config: ClassifierConfig, scratch: Path
) -> _FastText:
    """Train on normalised text.

    Args:
        documents: UTF-8 without a newline, and no label or `</s>` among the words.
        good: which of them are.
        config: how to train.
        scratch: a file to write the lines to, since the library reads nothing else; removed.

    Raises:
        ValueError: all words are too rare, or the updates diverged.
        ImportError: the library is missing.
    """
    fasttext = _import()
    with scratch.open("wb") as stream:
        for document, is_good in zip(documents, good, strict=True):
            stream.write(LABELS[not is_good].encode() + b" " + document + b"\n")
    try:
        model = fasttext.train_supervised(
            str(scratch),
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
    except RuntimeError as error:
        if "NaN" not in str(error):
            raise
        raise ValueError(
            f"training diverged with lr={config.lr}: lower lr (the paper's is 0.1)"
        ) from None
    finally:
        scratch.unlink()
    if not model.get_words(on_unicode_error="replace"):
        raise ValueError(
            f"no word comes {config.min_count} times in the {len(documents)} seeds: give more "
            "seeds, or lower min_count"
        )
    assert sorted(model.get_labels()) == sorted(LABELS)
    return model


def load(path: Path) -> _FastText:
    """A model from its .bin.

    Raises:
        ImportError: the library is missing.
    """
    return _import().load_model(str(path))


def predict(model: _FastText, texts: Iterable[str], positive: str = LABELS[0]) -> np.ndarray:
    """P(positive) as the library says, at most 1, fp32 `[texts]`.

    A text whose words have no row at all gets no label from the library, and 0.5 here.
    """
    texts = iter(texts)
    shares: list[float] = []
    while batch := list(islice(texts, 1000)):
        for labels, values in zip(*model.predict(batch, k=2), strict=True):
            found = dict(zip(labels, values, strict=True))
            shares.append(min(1.0, float(found[positive])) if found else 0.5)
    return np.array(shares, np.float32)


def version() -> str:
    """Which of the distributions that install a module `fasttext` is there, and its version."""
    import importlib.metadata as metadata

    name = (metadata.packages_distributions().get("fasttext") or ["fasttext"])[0]
    return f"{name} {metadata.version(name)}"


def _import() -> Any:
    try:
        import fasttext
    except ImportError as error:
        raise ImportError(
            "training and the reference backend need fastText: pip install fasttext-community"
        ) from error
    return fasttext

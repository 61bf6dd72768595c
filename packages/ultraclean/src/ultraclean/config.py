"""The classifier's settings, with Ultra-FineWeb's values as defaults (arXiv 2505.05427)."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from ultraclean.normalise import NORMALISERS

TRAINERS = ("native", "fasttext")
LONGEST_NGRAM = 16


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """How to train the fastText classifier.

    Args:
        dim: width of an embedding row (paper: 256). To the native trainer, how large fastText's
            random rows are at the start; see `width_one`.
        lr: fastText's learning rate, decaying linearly to 0 (paper: 0.1).
        word_ngrams: longest word n-gram hashed into a feature (paper: 3).
        min_count: words rarer than this in the seeds have no row of their own (paper: 5).
        epochs: passes over the seeds (paper: 3).
        bucket: rows shared by the hashed n-grams. Not stated in the paper; 2,000,000 matches the
            size of the released model (2M × 256 × 4 bytes).
        normaliser: how text is made into words; see `ultraclean.normalise`.
        tokenizer: path of the `tokenizer.json` that the normaliser `ultrafine` cuts words with; a
            copy goes into the classifier's folder.
        seed: of the shuffle, of the balancing and of fastText, 0..2³¹−1.
        threads: the native trainer counts words with them and gives the same bytes for any number;
            fastText's updates race with more than one.
        trainer: `native`, ours (see `width_one`), or `fasttext`, the library.

    Raises:
        ValueError: a value of another type or out of range, or a tokenizer missing or not wanted.
    """

    dim: int = 256
    lr: float = 0.1
    word_ngrams: int = 3
    min_count: int = 5
    epochs: int = 3
    bucket: int = 2_000_000
    normaliser: str = "ultrafine-words"
    tokenizer: str | None = None
    seed: int = 0
    threads: int = 1
    trainer: str = "native"

    def __post_init__(self) -> None:
        """Refuse what fastText would crash on or silently ignore."""
        for name in ("dim", "word_ngrams", "min_count", "epochs", "bucket", "threads", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if not least <= value < 2**31:
                raise ValueError(f"{name} must be at least {least} and below 2**31, got {value}")
        if not (isinstance(self.lr, int | float) and 0 < self.lr < math.inf):
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")
        if self.trainer not in TRAINERS:
            raise ValueError(f"unknown trainer {self.trainer!r}: expected native or fasttext")
        if self.word_ngrams > LONGEST_NGRAM:
            raise ValueError(f"word_ngrams must be at most {LONGEST_NGRAM}, got {self.word_ngrams}")
        if self.normaliser not in NORMALISERS:
            known = ", ".join(NORMALISERS)
            raise ValueError(f"unknown normaliser {self.normaliser!r}: expected one of {known}")
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", os.fspath(self.tokenizer))  # JSON knows no Path
        if (self.normaliser == "ultrafine") != (self.tokenizer is not None):
            raise ValueError(
                "normaliser 'ultrafine' needs tokenizer=PATH of a tokenizer.json; without one use "
                "'ultrafine-words'"
                if self.tokenizer is None
                else f"normaliser {self.normaliser!r} takes no tokenizer: leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClassifierConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key that is no setting, or a bad value.
        """
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no setting of a classifier; remove it")
        return cls(**values)

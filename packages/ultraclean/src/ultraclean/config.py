"""The classifier's settings, with Ultra-FineWeb's values as defaults (arXiv 2505.05427)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ClassifierConfig:
    """How to train the fastText classifier.

    Args:
        dim: width of an embedding row (paper: 256).
        lr: fastText's learning rate, decaying linearly to 0 (paper: 0.1).
        word_ngrams: longest word n-gram hashed into a feature (paper: 3).
        min_count: words rarer than this in the seeds have no row of their own (paper: 5).
        epochs: passes over the seeds (paper: 3).
        bucket: rows shared by the hashed n-grams. Not stated in the paper; 2,000,000 matches the
            size of the released model (2M × 256 × 4 bytes).
        normaliser: how text is made into words; see `ultraclean.normalise`.
        tokenizer: path of the `tokenizer.json` that the normaliser `ultrafine` cuts words with.
        seed: of the shuffle, of the balancing and of fastText.
        threads: 1 gives the same bytes each time; more is faster and fastText's updates then race.

    Raises:
        ValueError: a value out of range.
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

    def __post_init__(self) -> None:
        """Refuse what fastText would crash on or silently ignore."""
        for name in ("dim", "word_ngrams", "min_count", "epochs", "bucket", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

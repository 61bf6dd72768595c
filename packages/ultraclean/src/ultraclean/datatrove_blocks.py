"""Blocks for datatrove pipelines, which run on its local, Slurm and Ray executors.

What a block needs is opened in the process that runs it, so blocks pickle to a few bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from ultraclean.classifier import Classifier
from ultraclean.minhash import Decontaminator, MinHasher
from ultraclean.normalise import Normaliser

try:
    from datatrove.data import Document
    from datatrove.io import get_datafolder
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.formatters.base import BaseFormatter
    from datatrove.pipeline.writers.disk_base import DiskWriter
    from datatrove.utils.hashing import HashConfig
except ImportError as error:
    raise ImportError(
        "datatrove's blocks need datatrove: pip install 'minicpm4-ultraclean[datatrove]'"
    ) from error


class UltraCleanFilter(BaseFilter):
    """Keep documents that score at least `threshold`; the score goes into the metadata.

    Args:
        classifier: folder of the classifier.
        threshold: 0..1; 0 keeps all and only annotates.
        exclusion_writer: where dropped documents go.
        batch_size: documents scored in one call.
    """

    name = "UltraClean"

    def __init__(
        self,
        classifier: str | os.PathLike[str],
        threshold: float = 0.5,
        exclusion_writer: DiskWriter | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, got {threshold}")
        self.classifier, self.threshold = os.fspath(classifier), threshold
        self._opened: Classifier | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        """Whether to keep each document."""
        if self._opened is None:
            self._opened = Classifier.load(self.classifier)
        scores = self._opened.score([doc.text for doc in batch]).tolist()
        for doc, score in zip(batch, scores, strict=True):
            doc.metadata["ultraclean_score"] = round(score, 6)
        return [
            True if doc.metadata["ultraclean_score"] >= self.threshold else (False, "score")
            for doc in batch
        ]

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep a document."""
        return self.filter_batch([doc])[0]


class UltraCleanNormaliser(BaseFormatter):
    """Make text into a normaliser's words; see `ultraclean.Normaliser` for the arguments."""

    name = "UltraClean normaliser"

    def __init__(self, normaliser: str, tokenizer: str | None = None) -> None:
        super().__init__()
        Normaliser(normaliser, tokenizer)  # a wrong name is told now, not on a node
        self._arguments, self._opened = (normaliser, tokenizer), None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def format(self, text: str) -> str:
        """The words on one line."""
        if self._opened is None:
            self._opened = Normaliser(*self._arguments)
        return self._opened(text)


class UltraCleanMinhashSignature(MinhashDedupSignature):
    """datatrove's first stage of MinHash, natively; its other three stages take what it writes.

    The words and hash functions are ours (`ultraclean.minhash`), so all signatures of a corpus must
    come from this block. Hashes have 32 bits: give the later stages this block's `config`.

    Args:
        output_folder: where signatures go.
        bands, rows, ngrams, seed: see `MinHasher`.
    """

    name = "UltraClean MinHash signatures"

    def __init__(
        self, output_folder: Any, bands: int = 14, rows: int = 8, ngrams: int = 5, seed: int = 1
    ) -> None:
        config = MinhashConfig(
            n_grams=ngrams, num_buckets=bands, hashes_per_bucket=rows, seed=seed,
            hash_config=HashConfig(precision=32, hash_fc="sha1"),
        )  # fmt: skip
        # Past the parent's own constructor, which asks for a word tokenizer that is not used here.
        PipelineStep.__init__(self)
        self.output_folder, self.config = get_datafolder(output_folder), config
        self.num_hashes = bands * rows
        self.skip_existing_sigs = False
        self._hasher: MinHasher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hasher": None}

    def get_shingles(self, text: str) -> np.ndarray:
        """The text itself: its n-grams are made and hashed in one go by `get_signature`."""
        return np.array([text] if text.strip() else [], object)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Minima of each band."""
        c = self.config
        if self._hasher is None:
            self._hasher = MinHasher(c.num_buckets, c.hashes_per_bucket, c.n_grams, c.seed)
        signatures, _ = self._hasher.signatures([shingles[0]])
        return signatures[0].reshape(c.num_buckets, c.hashes_per_bucket).tolist()


class UltraCleanDecontamination(BaseFilter):
    """Drop documents that share n-grams with evaluation texts; see `Decontaminator`."""

    name = "UltraClean decontamination"

    def __init__(
        self,
        evaluations: Iterable[str],
        ngrams: int = 13,
        exclusion_writer: DiskWriter | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        self.evaluations, self.ngrams = list(evaluations), ngrams
        self._opened: Decontaminator | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        """Whether to keep each document."""
        if self._opened is None:
            self._opened = Decontaminator(self.evaluations, self.ngrams)
        found = self._opened.contaminated([doc.text for doc in batch])
        return [(False, "contaminated") if bad else True for bad in found]

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep a document."""
        return self.filter_batch([doc])[0]

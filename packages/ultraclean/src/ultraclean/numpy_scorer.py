"""The collapsed score in NumPy: what runs where the native library was not built.

Many texts are scored as one long list of words, each text ending in fastText's own `</s>`.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np

from ultraclean.hashing import word_hashes
from ultraclean.reference import END, LABEL, NGRAM_FACTOR, tokens

_NULL_TO_SPACE = bytes.maketrans(b"\0", b" ")


class NumpyScorer:
    """P(good) from the table of scalars; see `scorer.Scorer` for the arguments."""

    def __init__(self, table: np.ndarray, words: list[bytes], ngrams: int) -> None:
        self._rows = np.nan_to_num(table.astype(np.float64))
        self._there = None if not np.isnan(table).any() else ~np.isnan(table)
        self._ngrams, self._vocabulary = ngrams, len(words)
        self._bucket = len(table) - len(words)
        self._ids = {word: row for row, word in enumerate(words)}
        # Two entries after the words': `</s>`, should the seeds have been too few for its row,
        # and any word outside the vocabulary. They count for nothing but take part in n-grams.
        self._end = self._ids.setdefault(END, len(words))
        self._scalars = np.append(self._rows[: len(words)], (0.0, 0.0))
        there = np.ones(len(words)) if self._there is None else self._there[: len(words)]
        self._counts = np.append(there, (0.0, 0.0))
        self._hashes = np.append(word_hashes(words), (word_hashes([END])[0], np.uint64(0)))

    def score(self, texts: list[str]) -> np.ndarray:
        """P(good) of normalised texts, fp32 `[texts]`."""
        words = b" ".join(_one_document(text) for text in texts).translate(_NULL_TO_SPACE).split()
        ids = np.fromiter(map(self._ids.get, words, repeat(-1)), np.int64, len(words))
        hashes = self._hashes[ids]
        strange = np.flatnonzero(ids < 0)
        if len(strange):
            hashes[strange] = word_hashes([words[i] for i in strange.tolist()])
        ends = np.flatnonzero(ids == self._end)
        starts = np.append(0, ends[:-1] + 1)
        totals, counts = self._scalars[ids], self._counts[ids]
        chain = hashes
        for n in range(2, min(self._ngrams, len(words)) + 1 if self._bucket else 0):
            chain = chain[:-1] * np.uint64(NGRAM_FACTOR) + hashes[n - 1 :]
            rows = (chain % np.uint64(self._bucket)).astype(np.int64) + self._vocabulary
            inside = np.ones(len(rows)) if self._there is None else self._there[rows].astype(float)
            for before_end in range(n - 1):  # n-grams that would reach into the next text
                beyond = ends - before_end
                inside[beyond[(beyond >= starts) & (beyond < len(rows))]] = 0
            totals[: len(rows)] += self._rows[rows] * inside
            counts[: len(rows)] += inside
        count = np.add.reduceat(counts, starts)
        logits = np.add.reduceat(totals, starts) / np.maximum(count, 1)
        shares = np.minimum(1.0, 0.5 + 0.5 * np.tanh(0.5 * logits) + 1e-5)
        # No row at all, not even the end's: the library gives no label, and nothing is known.
        return np.where(count > 0, shares, 0.5).astype(np.float32)


def _one_document(text: str) -> bytes:
    """The text's words with exactly one `</s>`, at their end."""
    data = text.encode("utf-8", "replace")
    if END in data or LABEL in data:  # rare: only then look at word after word
        return b" ".join(tokens(text))
    return data + b" " + END

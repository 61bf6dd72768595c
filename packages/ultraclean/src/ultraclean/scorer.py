"""Exact scoring from one number per row: the classifier, collapsed.

A fastText classifier is linear after the look-up: with rows E_r averaged into h and a softmax over
two labels, P(pos) = σ(h·(w_pos − w_neg)) = σ(mean_r s_r) with s_r = E_r·(w_pos − w_neg). So after
training each row of the input matrix becomes one scalar, and a 2 GB model a table of 8 MB that
every process can map, whatever the width was.

Many texts are scored as one long list of words, each text ending in fastText's own `</s>`. A
text's score does not depend on its neighbours, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np

from ultraclean.hashing import word_hashes
from ultraclean.reference import END, LABEL, NGRAM_FACTOR, tokens

_NULL_TO_SPACE = bytes.maketrans(b"\0", b" ")
# Characters scored at a time: enough to spread NumPy's cost per call, few enough for the cache.
BATCH = 1 << 18


def collapse(inputs: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """s_r = E_r·(w_pos − w_neg): fp32 `[rows]` from `[rows, dim]` and two vectors `[dim]`."""
    direction = positive.astype(np.float64) - negative.astype(np.float64)
    scalars = np.empty(len(inputs), dtype=np.float32)
    for start in range(0, len(inputs), 1 << 16):  # in pieces: the sum wants fp64, the matrix is big
        part = inputs[start : start + (1 << 16)]
        scalars[start : start + len(part)] = part.astype(np.float64) @ direction
    return scalars


class Scorer:
    """P(good) from the table of scalars.

    Args:
        table: fp32 `[len(words) + bucket]`; may be memory-mapped.
        words: the vocabulary in row order, as fastText lists it.
        ngrams: longest word n-gram.
    """

    def __init__(self, table: np.ndarray, words: list[bytes], ngrams: int) -> None:
        self.table = np.asarray(table)  # still mapped, without the subclass's cost per call
        self.words = words
        self.ngrams = ngrams
        self.bucket = len(table) - len(words)
        self._ids = {word: row for row, word in enumerate(words)}
        # Two entries after the words': `</s>`, should the seeds have been too few for its row,
        # and any word outside the vocabulary. They count for nothing but take part in n-grams.
        self._end = self._ids.setdefault(END, len(words))
        self._scalars = np.append(self.table[: len(words)].astype(np.float64), (0.0, 0.0))
        self._counts = np.append(np.ones(len(words)), (0.0, 0.0))
        self._hashes = np.append(word_hashes(words), (word_hashes([END])[0], np.uint64(0)))

    @classmethod
    def load(cls, folder: Path, ngrams: int) -> Scorer:
        """Map the table that `save` wrote."""
        words = (folder / "words.txt").read_bytes().split(b"\n")[:-1]
        return cls(
            np.load(folder / "scalars.npy", mmap_mode="r", allow_pickle=False), words, ngrams
        )

    def save(self, folder: Path) -> None:
        """Write `scalars.npy` and `words.txt` into an existing folder."""
        np.save(folder / "scalars.npy", self.table)
        (folder / "words.txt").write_bytes(b"".join(w + b"\n" for w in self.words))

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """P(good) of each normalised text, fp32 `[texts]`, within 1e-5 of fastText's."""
        parts = [self._score(batch) for batch in _batches(texts)]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _score(self, texts: list[str]) -> np.ndarray:
        words = b" ".join(_one_document(text) for text in texts).translate(_NULL_TO_SPACE).split()
        ids = np.fromiter(map(self._ids.get, words, repeat(-1)), np.int64, len(words))
        hashes = self._hashes[ids]
        strange = np.flatnonzero(ids < 0)
        if len(strange):
            hashes[strange] = word_hashes([words[i] for i in strange.tolist()])
        ends = np.flatnonzero(ids == self._end)
        starts = np.append(0, ends[:-1] + 1)
        totals = self._scalars[ids]
        counts = np.add.reduceat(self._counts[ids], starts)
        chain = hashes
        for n in range(2, min(self.ngrams, len(words)) + 1):
            chain = chain[:-1] * np.uint64(NGRAM_FACTOR) + hashes[n - 1 :]
            rows = (chain % np.uint64(self.bucket)).astype(np.int64) + len(self.words)
            picked = self.table.take(rows)
            for before_end in range(n - 1):  # n-grams that would reach into the next text
                beyond = ends - before_end
                picked[beyond[(beyond >= starts) & (beyond < len(picked))]] = 0
            totals[: len(picked)] += picked
            counts += np.maximum(ends - starts + 2 - n, 0)
        logits = np.add.reduceat(totals, starts) / np.maximum(counts, 1)
        # tanh is the logistic function without its overflow; 1e-5 is what fastText adds.
        shares = np.minimum(1.0, 0.5 + 0.5 * np.tanh(0.5 * logits) + 1e-5)
        # No row at all, not even the end's: the library gives no label, and nothing is known.
        return np.where(counts > 0, shares, 0.5).astype(np.float32)

    def words_by_scalar(self) -> list[tuple[str, float]]:
        """Each word of the vocabulary with its scalar, the best first."""
        order = np.argsort(-self._scalars[: len(self.words)], kind="stable").tolist()
        return [(self.words[i].decode("utf-8", "replace"), float(self._scalars[i])) for i in order]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of some `BATCH` characters together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _one_document(text: str) -> bytes:
    """The text's words with exactly one `</s>`, at their end."""
    data = text.encode("utf-8", "replace")
    if END in data or LABEL in data:  # rare: only then look at word after word
        return b" ".join(tokens(text))
    return data + b" " + END

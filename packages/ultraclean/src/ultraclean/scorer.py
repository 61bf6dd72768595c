"""Exact scoring from one number per row: the classifier, collapsed.

A fastText classifier is linear after the look-up: with rows E_r averaged into h and a softmax over
two labels, P(pos) = σ(h·(w_pos − w_neg)) = σ(mean_r s_r) with s_r = E_r·(w_pos − w_neg). So after
training each row of the input matrix becomes one scalar, and a 2 GB model a table of 8 MB that
every process can map, whatever the width was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ultraclean.reference import END, LABEL, NGRAM_FACTOR, word_hash

_NULL_TO_SPACE = bytes.maketrans(b"\0", b" ")
# Words outside the vocabulary whose hashes are remembered. Past this the memory is emptied: a
# crawl has no end of misspelt words, and most come once.
_MEMORY = 1_000_000


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
        self.table = table
        self.ngrams = ngrams
        self.bucket = len(table) - len(words)
        self._first = len(words)
        scalars = table[: len(words)].tolist()
        # word -> (its scalar, its hash sign-extended to 64 bits, does it have a row)
        self._known = {w: (s, _signed(w), 1) for w, s in zip(words, scalars, strict=True)}
        self._unknown: dict[bytes, tuple[float, int, int]] = {}

    @classmethod
    def load(cls, folder: Path, ngrams: int) -> Scorer:
        """Map the table that `save` wrote."""
        words = (folder / "words.txt").read_bytes().split(b"\n")[:-1]
        return cls(
            np.load(folder / "scalars.npy", mmap_mode="r", allow_pickle=False), words, ngrams
        )

    def save(self, folder: Path) -> None:
        """Write `scalars.npy` and `words.txt` into an existing folder."""
        np.save(folder / "scalars.npy", np.asarray(self.table))
        (folder / "words.txt").write_bytes(b"".join(w + b"\n" for w in self._known))

    def _look_up(self, word: bytes) -> tuple[float, int, int]:
        entry = self._known.get(word) or self._unknown.get(word)
        if entry is None:
            if len(self._unknown) >= _MEMORY:
                self._unknown.clear()
            entry = self._unknown[word] = (0.0, _signed(word), 0)
        return entry

    def score_one(self, text: str) -> float:
        """P(good) of one normalised text, within 1e-5 of fastText's."""
        words = text.encode("utf-8", "replace").translate(_NULL_TO_SPACE).split()
        if END in words:
            del words[words.index(END) :]
        if LABEL in text.encode("utf-8", "replace"):
            words = [w for w in words if not w.startswith(LABEL)]
        words.append(END)
        known = self._known
        look_up = self._look_up
        entries = [known.get(w) or look_up(w) for w in words]
        scalars, hashes, rows = zip(*entries, strict=True)
        total, count = sum(scalars), sum(rows)
        h = chain = np.array(hashes, dtype=np.int64).view(np.uint64)
        for n in range(2, self.ngrams + 1):
            if len(h) < n:
                break
            chain = chain[:-1] * np.uint64(NGRAM_FACTOR) + h[n - 1 :]
            picked = self.table[self._first + (chain % np.uint64(self.bucket)).astype(np.int64)]
            total += float(picked.sum(dtype=np.float64))
            count += len(chain)
        if not count:
            return 0.5
        # tanh is the logistic function without its overflow; 1e-5 is what fastText adds.
        return min(1.0, 0.5 + 0.5 * float(np.tanh(0.5 * total / count)) + 1e-5)

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """P(good) of each normalised text, fp32 `[texts]`."""
        return np.fromiter((self.score_one(t) for t in texts), dtype=np.float32)

    def words_by_scalar(self) -> list[tuple[str, float]]:
        """Each word of the vocabulary with its scalar, the best first."""
        pairs = [(w.decode("utf-8", "replace"), s) for w, (s, _, _) in self._known.items()]
        return sorted(pairs, key=lambda pair: -pair[1])


def _signed(word: bytes) -> int:
    h = word_hash(word)
    return h - (1 << 32) if h >= 1 << 31 else h

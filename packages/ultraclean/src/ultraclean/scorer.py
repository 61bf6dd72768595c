"""Exact scoring from one number per row: the classifier, collapsed.

A fastText classifier is linear after the look-up: with rows E_r averaged into h and a softmax over
two labels, P(pos) = σ(h·(w_pos − w_neg)) = σ(mean_r s_r) with s_r = E_r·(w_pos − w_neg). So after
training each row of the input matrix becomes one scalar, and a 2 GB model a table of 8 MB that
every process can map, whatever the width was. (Of two labels the second's scalar is the first's
negative, so one is kept.)

The sums are made by the native library (csrc/score.hpp), or where it is missing by NumPy
(numpy_scorer.py). A text's score does not depend on its neighbours, to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ultraclean import native, native_args
from ultraclean.numpy_scorer import NumpyScorer

if TYPE_CHECKING:
    from ultraclean.normalise import Normaliser

# Characters scored at a time: a block of a file in one call. A thread that comes back from a call
# waits for the interpreter's lock: with a quarter of this, two workers lost 4 % of their time so.
BATCH = 1 << 20


class Scorer:
    """P(good) from the table of scalars.

    Args:
        table: fp32 `[words + bucket]`; may be memory-mapped. NaN marks a row that the model does
            not have, as a pruned one lacks most of the n-grams'.
        words: the vocabulary in row order, each word ended by a newline.
        ngrams: longest word n-gram, at most 16.
        backend: `native`, `numpy`, or `auto`: native where it is there.

    Attributes:
        backend: the one in use.

    Raises:
        ValueError: unknown backend, or n-grams out of range.
        RuntimeError: the native backend was asked for by name and is not there.
    """

    def __init__(
        self, table: np.ndarray, words: bytes | np.ndarray, ngrams: int, backend: str = "auto"
    ) -> None:
        if not 1 <= ngrams <= 16:
            raise ValueError(f"word n-grams must be 1..16 words long, got {ngrams}")
        if backend not in ("auto", "native", "numpy"):
            raise ValueError(f"unknown backend {backend!r}: auto, native or numpy")
        library, reason = native.library()
        if backend == "native" and library is None:
            raise RuntimeError(reason)
        self.backend = "native" if library is not None and backend != "numpy" else "numpy"
        self.table = np.asarray(table)  # still mapped, without the subclass's cost per call
        self.ngrams = ngrams
        self._words = np.frombuffer(words, np.uint8) if isinstance(words, bytes) else words
        self._count = int(np.count_nonzero(self._words == 10))
        self.bucket = len(self.table) - self._count
        self._library, self._numpy = library, None
        self._local = native.WorkOfThread()
        if self.backend == "native":
            self.model = self._index()
        self._making = threading.Lock()
        self._bpe: dict[int, native_args.BpeArgs] = {}

    def _index(self) -> native_args.ModelArgs:
        ends = np.flatnonzero(self._words == 10)
        begins = np.append(0, ends + 1)
        letters = np.ascontiguousarray(np.append(self._words[self._words != 10], 0), np.uint8)
        offsets = np.ascontiguousarray(begins - np.arange(len(begins)), np.int64)
        slots = self._library.index(letters, offsets)
        pruned = bool(np.isnan(self.table).any())
        return native.keep(
            native_args.ModelArgs(
                self.table.ctypes.data, slots.ctypes.data, letters.ctypes.data,
                len(slots), self._count, self.bucket, self.ngrams, int(pruned),
            ),
            self.table, slots, letters,
        )  # fmt: skip

    @property
    def words(self) -> list[bytes]:
        """The vocabulary in row order; made anew at each call."""
        return self._words.tobytes().split(b"\n")[:-1]

    @classmethod
    def load(cls, folder: Path, ngrams: int, backend: str = "auto") -> Scorer:
        """Map the table that `save` wrote."""
        file = folder / "words.txt"
        words = np.memmap(file, np.uint8, "r") if file.stat().st_size else b""
        table = np.load(folder / "scalars.npy", mmap_mode="r", allow_pickle=False)
        return cls(table, words, ngrams, backend)

    def save(self, folder: Path) -> None:
        """Write `scalars.npy` and `words.txt` into an existing folder."""
        np.save(folder / "scalars.npy", self.table)
        (folder / "words.txt").write_bytes(self._words.tobytes())

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """P(good) of each normalised text, fp32 `[texts]`, within 1e-5 of fastText's."""
        parts = [self._words_of(batch) for batch in batches(texts)]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _words_of(self, texts: list[str]) -> np.ndarray:
        if self.backend == "numpy":
            self._numpy = self._numpy or NumpyScorer(self.table, self.words, self.ngrams)
            return self._numpy.score(texts)
        documents = [t.encode("utf-8", "replace") for t in texts]
        logits, _ = self._library.score(self.model, documents, self._local.work)
        return probabilities(logits)

    def score_raw(
        self, texts: Iterable[str], normaliser: Normaliser
    ) -> tuple[np.ndarray, np.ndarray]:
        """P(good) of raw texts, and how many tokens each has.

        The same as `score(map(normaliser, texts))`, natively where the normaliser can be.

        Returns:
            (fp32 `[texts]`, int64 `[texts]`): tokens are the tokenizer's, or words where the
            normaliser has none.
        """
        parts = [self._raw(batch, normaliser) for batch in batches(texts)]
        if not parts:
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _raw(self, texts: list[str], normaliser: Normaliser) -> tuple[np.ndarray, np.ndarray]:
        if self.backend == "numpy":
            made = [normaliser(text) for text in texts]
            return self._words_of(made), np.array([t.count(" ") + 1 for t in made], np.int64)
        documents = [t.encode("utf-8", "replace") for t in texts]
        bpe = None
        with self._making:  # or each thread would make tables of its own
            fold = normaliser.fold
            if normaliser.tokenizer is not None:
                bpe = self._bpe.get(id(normaliser))
                if bpe is None:
                    bpe = self._bpe[id(normaliser)] = normaliser.features(self)
        if normaliser.tokenizer is not None and normaliser.tables is None:
            # A tokenizer of another kind cuts the text; its tokens are scored here.
            logits, counted = self._library.score(
                self.model, normaliser.ids(texts), self._local.work, bpe=bpe
            )
        else:
            logits, counted = self._library.score(
                self.model, documents, self._local.work, fold.args, bpe, fold.expansion
            )
        shares = probabilities(logits)
        # A sigma, a mark that moves, an added token's text: rare, and Python knows what to do.
        for i in np.flatnonzero(np.isinf(logits)).tolist():
            made = normaliser(texts[i])
            shares[i] = self._words_of([made])[0]
            counted[i] = normaliser.count(texts[i], made)
        return shares, counted

    def exact(self, texts: Iterable[str], inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """fastText's own probabilities of normalised texts, bit for bit, fp32 `[texts, labels]`.

        Args:
            texts: normalised.
            inputs: the model's fp32 `[rows, dim]`, mapped. outputs: fp32 `[labels, dim]`.

        Raises:
            RuntimeError: there is no native library.
        """
        if self._library is None:
            raise RuntimeError(f"exact scores need the native library: {native.library()[1]}")
        parts = [
            self._library.exact(
                self.model, [t.encode("utf-8", "replace") for t in batch], inputs,
                np.ascontiguousarray(outputs), self._local.exact,
            )
            for batch in batches(texts)
        ]  # fmt: skip
        return np.concatenate(parts) if parts else np.zeros((0, len(outputs)), np.float32)

    def words_by_scalar(self) -> list[tuple[str, float]]:
        """Each word of the vocabulary with its scalar, the best first."""
        words, scalars = self.words, self.table[: self._count]
        order = np.argsort(-scalars, kind="stable").tolist()
        return [(words[i].decode("utf-8", "replace"), float(scalars[i])) for i in order]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """P(good) as the library says it, fp32: NaN, a text without any row, becomes 0.5."""
    # tanh is the logistic function without its overflow; 1e-5 is what fastText adds.
    shares = np.minimum(1.0, 0.5 + 0.5 * np.tanh(0.5 * logits) + 1e-5)
    return np.where(np.isnan(logits), 0.5, shares).astype(np.float32)


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
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

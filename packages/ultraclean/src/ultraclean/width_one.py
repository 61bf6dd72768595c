"""Our own trainer: a fastText classifier of any width, trained as one of width one.

fastText's classifier is a linear network of two layers: rows E_r, averaged over a document to
h = Eᵀx, and, of two labels, the difference d of their output vectors; the logit is d·h. One step
of gradient descent with a = lr·(label − p) is E ← E + a·x dᵀ, d ← d + 2a·h. The library begins
with d = 0 and with rows drawn from ±1/dim, whose squared length is κ = 1/(3·dim) on average.

What is learned, the scalar of each row s = E d, moves by a·|d|²·x + 2a·E Eᵀx. For small steps
EᵀE − d dᵀ/2 never changes (Arora, Cohen & Hazan 2018), and the rows at the start are orthogonal as
far as their width lets them: random vectors are. Then E Eᵀ is κ everywhere, and κ + |d|²/2 along s,
so that

    ṡ = a·(m·x + 2 (s·x)/m · s),    ṁ = 4a·(s·x),    m = |d|² + 2κ.

No width is left in it. With s = δ·e and m = δ² it reads ė = a·δ·x, δ̇ = 2a·(e·x): the steps of the
same network of width one, begun at e = 0 and δ = √(2κ) = √(2/(3·dim)). So a row needs one number
instead of 256 and a step reads four bytes instead of 1,024. What the library does besides is the
noise of its random rows, which a finite width leaves not quite orthogonal.

Threads share the counting of words. The steps are one thread's, so nothing depends on their number:
a step is a few microseconds, too short to be shared (docs/log.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ultraclean import native
from ultraclean._files import atomic_path
from ultraclean.config import ClassifierConfig
from ultraclean.native_args import ProgressArgs, TrainArgs
from ultraclean.reference import NGRAM_FACTOR
from ultraclean.vocabulary import Counted, count_words

_SLICE = 250_000  # tokens between two looks at the clock
_SAVE_SECONDS = 30.0


@dataclass
class State:
    """Where training is."""

    table: np.ndarray
    """e, fp32 `[words + bucket]`."""
    output: float
    """δ."""
    epoch: int = 0
    document: int = 0
    tokens: int = 0

    @property
    def sound(self) -> bool:
        """Whether the numbers are numbers."""
        return math.isfinite(self.output) and abs(self.output) < 1e15


@dataclass(frozen=True)
class Fitted:
    """A trained classifier of width one.

    Attributes:
        words, counts: vocabulary in row order.
        table: fp32 `[words + bucket]`, the input matrix.
        output: w_pos − w_neg.
    """

    words: list[bytes]
    counts: list[int]
    table: np.ndarray
    output: float


def fit(
    documents: Sequence[bytes],
    good: Sequence[bool],
    config: ClassifierConfig,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    backend: str = "auto",
) -> Fitted:
    """Train on normalised text.

    Args:
        documents: UTF-8 words separated by spaces, in the order to learn from.
        good: which of them are.
        config: how. The same result for any number of threads.
        checkpoint: a file that an interrupted training is kept in, twice a minute, and goes on
            from; removed at the end.
        progress: called with (tokens done, of how many) every quarter of a million.
        backend: `native`, `numpy`, or `auto`: native where it is there.

    Raises:
        ValueError: one class only, all words too rare, or steps that diverge.
        RuntimeError: the native backend was asked for by name and is not there.
    """
    if len(set(map(bool, good))) != 2:
        raise ValueError("expected good and bad documents, got only one of the two kinds")
    counted = count_words(documents, config.min_count, config.threads, backend)
    if not counted.words:
        raise ValueError(
            f"no word comes {config.min_count} times in the {len(documents)} seeds: give more "
            "seeds, or lower min_count"
        )
    labels = np.array(good, np.uint8)
    run = _Plain if backend == "numpy" or native.library()[0] is None else _Native
    trainer = run(counted, labels, config)
    key = "" if checkpoint is None else _fingerprint(counted, labels, config)
    state = _resumed(checkpoint, key) or State(
        np.zeros(len(counted.words) + config.bucket, np.float32), math.sqrt(2 / (3 * config.dim))
    )
    saved = time.monotonic()
    try:
        while state.epoch < config.epochs:
            progress(state.tokens, trainer.total)
            if checkpoint is not None and time.monotonic() - saved > _SAVE_SECONDS:
                _save(state, checkpoint, key)
                saved = time.monotonic()
            trainer.advance(state, _stop(counted.starts, state.document))
            if not state.sound:
                break
            if state.document == len(documents):
                state.epoch, state.document = state.epoch + 1, 0
        progress(state.tokens, trainer.total)
    except KeyboardInterrupt:
        if checkpoint is not None:
            _save(state, checkpoint, key)
        raise
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    if not (state.sound and np.isfinite(state.table).all()):
        raise ValueError(f"training diverged with lr={config.lr}: lower lr (the paper's is 0.1)")
    return Fitted(counted.words, counted.counts, state.table, state.output)


def _stop(starts: np.ndarray, document: int) -> int:
    """The document before which a slice ends."""
    found = int(np.searchsorted(starts, starts[document] + _SLICE))
    return min(max(found, document + 1), len(starts) - 1)


class _Plain:
    """The steps written down, in NumPy; what runs where there is no compiler."""

    def __init__(self, counted: Counted, good: np.ndarray, config: ClassifierConfig) -> None:
        self.counted, self.good, self.config = counted, good, config
        self.total = config.epochs * len(counted.tokens)

    def rows(self, document: int) -> np.ndarray:
        """Rows of a document's words and n-grams, int64."""
        c = self.counted
        features = c.features[c.tokens[c.starts[document] : c.starts[document + 1]]]
        parts = [features["row"][features["row"] >= 0].astype(np.int64)]
        hashes = features["hash"].view(np.int32).astype(np.int64).view(np.uint64)
        chain = hashes
        for n in range(2, min(self.config.word_ngrams, len(hashes)) + 1):
            chain = chain[:-1] * np.uint64(NGRAM_FACTOR) + hashes[n - 1 :]
            grams = (chain % np.uint64(self.config.bucket)).astype(np.int64)
            parts.append(grams + len(c.words))
        return np.concatenate(parts)

    @np.errstate(over="ignore", invalid="ignore")  # steps that diverge are told by their result
    def advance(self, state: State, until: int) -> None:
        """Go on to the document `until` of the epoch."""
        starts = self.counted.starts
        while state.document < until and state.sound:
            rate = self.config.lr * (1 - state.tokens / self.total)
            state.tokens += int(starts[state.document + 1] - starts[state.document])
            rows, good = self.rows(state.document), float(self.good[state.document])
            state.document += 1
            if not len(rows):
                continue
            hidden = float(state.table[rows].mean(dtype=np.float64))
            share = 1 / (1 + math.exp(-max(-700.0, min(700.0, state.output * hidden))))
            activity = rate * (good - share)
            np.add.at(state.table, rows, np.float32(activity * state.output / len(rows)))
            state.output += 2 * activity * hidden


class _Native:
    """The same in C++ (`csrc/train.hpp`)."""

    def __init__(self, counted: Counted, good: np.ndarray, config: ClassifierConfig) -> None:
        self.counted, self.good, self.config = counted, good, config
        self.total = config.epochs * len(counted.tokens)
        longest = int(np.diff(counted.starts).max())
        self._rows = np.empty(config.word_ngrams * longest + 1, np.uint32)
        self._library = native.library()[0]

    def advance(self, state: State, until: int) -> None:
        """Go on to the document `until` of the epoch."""
        c = self.counted
        progress = ProgressArgs(state.output, state.document, state.tokens, 0)
        self._library.run("train", TrainArgs(
            c.tokens.ctypes.data, c.starts.ctypes.data, self.good.ctypes.data,
            c.features.ctypes.data, state.table.ctypes.data, len(c.words), self.config.bucket,
            self.config.lr, self.total, until, ctypes.addressof(progress),
            self._rows.ctypes.data, self.config.word_ngrams,
        ))  # fmt: skip
        state.output = math.nan if progress.diverged else progress.output
        state.document, state.tokens = progress.document, progress.tokens


def _fingerprint(counted: Counted, good: np.ndarray, config: ClassifierConfig) -> str:
    digest = hashlib.sha256(
        repr((config.dim, config.lr, config.word_ngrams, config.epochs, config.bucket))
        .encode()
    )  # fmt: skip
    for array in (counted.tokens, counted.starts, counted.features, good):
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def _save(state: State, path: Path, key: str) -> None:
    at = np.array([state.epoch, state.document, state.tokens])
    with atomic_path(path) as target, target.open("wb") as stream:
        np.savez(stream, table=state.table, at=at, output=state.output, key=key)


def _resumed(path: Path | None, key: str) -> State | None:
    """What an interrupted training of the same text and settings left."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as found:
            if str(found["key"]) == key:
                return State(found["table"], float(found["output"]), *map(int, found["at"]))
    except (ValueError, OSError, KeyError, BadZipFile):
        pass  # no checkpoint of ours: it will be replaced
    return None

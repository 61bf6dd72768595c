"""MinHash signatures (Broder 1997) of word n-grams, near-duplicates by LSH, and decontamination.

Words are lower case, without marks and punctuation, a Chinese character a word. Of each hash
function h ↦ (a·h + b) mod 2⁶⁴, a odd, the upper half is kept (multiply-shift, Dietzfelbinger et al.
1997). Two texts whose n-grams have Jaccard similarity s agree in each minimum with probability s,
and so in some band of `rows` minima out of `bands` with probability 1 − (1 − s^rows)^bands: at
14 × 8, as in FineWeb, a half at s ≈ 0.72.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from ultraclean import native
from ultraclean.folding import fold_of

_FEW = 256  # documents in a call


class MinHasher:
    """Signatures of texts.

    Args:
        bands, rows: `bands * rows` hash functions.
        ngrams: words in a shingle; a shorter text is one shingle.
        seed: of the hash functions.

    Raises:
        ValueError: a size below one.
        RuntimeError: there is no native library.
    """

    def __init__(self, bands: int = 14, rows: int = 8, ngrams: int = 5, seed: int = 1) -> None:
        for name, value in (("bands", bands), ("rows", rows), ("ngrams", ngrams)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.bands, self.rows, self.ngrams = bands, rows, ngrams
        draw = np.random.default_rng(seed)
        factors = draw.integers(0, 2**64, (2, bands * rows), np.uint64)
        factors[0] |= np.uint64(1)
        self._factors = np.ascontiguousarray(factors)
        self._library = _library()
        self._local = _Local()

    def signatures(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 `[texts, bands · rows]`, hash of each text's words uint64 `[texts]`).

        A text without a word has a signature of all ones; equal hashes mean equal words.
        """
        fold = fold_of("minhash")
        parts = [
            self._library.minhash(
                _bytes(texts[i : i + _FEW]), fold.args, fold.expansion, self._factors,
                self.ngrams, self._local.work,
            )
            for i in range(0, len(texts), _FEW)
        ]  # fmt: skip
        if not parts:
            hashes = self._factors.shape[1]
            return np.zeros((0, hashes), np.uint32), np.zeros(0, np.uint64)
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def band_hashes(self, signatures: np.ndarray) -> np.ndarray:
        """uint64 `[texts, bands]`: one number for each band, equal where all its minima are."""
        found = np.zeros((len(signatures), self.bands), np.uint64)
        by_band = signatures.reshape(len(signatures), self.bands, self.rows).astype(np.uint64)
        for row in range(self.rows):
            mixed = (found ^ by_band[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
            found = mixed ^ (mixed >> np.uint64(29))
        return found


def clusters(bands: np.ndarray) -> np.ndarray:
    """The first text of each text's cluster, int64 `[texts]`.

    Texts that share a band are in one cluster, and so are all that are joined by such pairs.

    Args:
        bands: uint64 `[texts, bands]`, from `MinHasher.band_hashes`.
    """
    leader = np.arange(len(bands))

    def root(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for band in bands.T:
        _, first, place = np.unique(band, return_index=True, return_inverse=True)
        for i in np.flatnonzero(first[place] != np.arange(len(band))).tolist():
            a, b = root(i), root(int(first[place[i]]))
            leader[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(leader))], np.int64)


class Decontaminator:
    """Knows the n-grams of evaluation texts, and which text shares one.

    Args:
        texts: of the evaluations: questions, answers, passages.
        ngrams: words that must be equal in a row; GPT-3 and datatrove take 12 or 13.
    """

    def __init__(self, texts: Iterable[str], ngrams: int = 13) -> None:
        if not 1 <= ngrams < 256:
            raise ValueError(f"ngrams must be 1..255, got {ngrams}")
        self.ngrams = ngrams
        self._library, self._local = _library(), _Local()
        found = [gram for part in _few(texts) for gram in self._grams(part)]
        self.known = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)

    @property
    def fingerprint(self) -> str:
        """Equal for equal n-grams."""
        return hashlib.sha256(self.known.tobytes() + bytes([self.ngrams])).hexdigest()

    def contaminated(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text shares n-grams with an evaluation."""
        if not len(self.known) or not texts:
            return [False] * len(texts)
        grams = [gram for part in _few(texts) for gram in self._grams(part)]
        counts = np.array([len(g) for g in grams])
        every = np.concatenate(grams)
        at = np.minimum(np.searchsorted(self.known, every), len(self.known) - 1)
        owner = np.repeat(np.arange(len(grams)), counts)
        hits = np.bincount(owner[self.known[at] == every], minlength=len(grams))
        return (hits > 0).tolist()

    def _grams(self, texts: list[str]) -> list[np.ndarray]:
        fold = fold_of("minhash")
        return self._library.grams(
            _bytes(texts), fold.args, fold.expansion, self.ngrams, self._local.work
        )


class _Local(threading.local):
    def __init__(self) -> None:
        self.work = native.Work()


def _bytes(texts: Sequence[str]) -> list[bytes]:
    return [t.encode("utf-8", "replace") for t in texts]


def _few(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _FEW:
            yield batch
            batch = []
    if batch:
        yield batch


def _library() -> native.Library:
    library, reason = native.library()
    if library is None:
        raise RuntimeError(f"MinHash needs the native library: {reason}")
    return library

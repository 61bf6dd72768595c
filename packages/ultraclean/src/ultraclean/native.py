"""The native library (`csrc/args.h`) as ctypes sees it.

A call releases the interpreter's lock and owns nothing: all memory is the caller's, so any number
of threads may score from one mapped table at a time. Where the library is missing (the wheel was
built without a compiler) there is a reason to show, and NumPy and `tokenizers` do its work.
"""

from __future__ import annotations

import ctypes
import functools
import sysconfig
import threading
from collections.abc import Sequence
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ultraclean.native_args import (
    SLOT,
    BpeArgs,
    ExactArgs,
    FoldArgs,
    IndexArgs,
    MinhashArgs,
    ModelArgs,
    ScoreArgs,
    WordsArgs,
)


def _at(array: np.ndarray) -> int:
    return array.ctypes.data


class Library:
    """The loaded library.

    Attributes:
        level: instruction set in use for MinHash, "scalar" to "avx512_vnni".
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._operations = {}
        for name in ("index", "score", "exact", "minhash", "words", "count", "merge", "train"):
            function = getattr(library, f"ultraclean_{name}")
            function.restype, function.argtypes = c_int32, [c_void_p, c_int32, c_int32]
            self._operations[name] = function
        library.ultraclean_level_name.restype = c_char_p
        library.ultraclean_cache_bytes.restype = c_int64
        self.level = library.ultraclean_level_name(library.ultraclean_level()).decode()
        self._cache_bytes = library.ultraclean_cache_bytes()

    def run(self, name: str, args: Structure) -> None:
        """An operation of `csrc/args.h`."""
        if error := self._operations[name](ctypes.byref(args), 0, 1):
            raise RuntimeError(f"ultraclean_{name} failed with code {error}: please report this")

    def index(self, words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Slots of a vocabulary: words' bytes one after the other, int64 offsets `[words + 1]`."""
        count = len(offsets) - 1
        slots = np.zeros(1 << max(4, (4 * count - 1).bit_length()), SLOT)
        self.run("index", IndexArgs(_at(words), _at(offsets), count, _at(slots), len(slots)))
        return slots

    def score(
        self,
        model: ModelArgs,
        documents: Sequence[bytes] | tuple[np.ndarray, np.ndarray],
        work: Work,
        fold: FoldArgs | None = None,
        bpe: BpeArgs | None = None,
        expansion: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(logits fp64 `[documents]`, tokens or words of each).

        A logit is NaN for a document without any row, infinite for one that is left to Python.

        Args:
            model: the collapsed classifier.
            documents: UTF-8; or (token ids uint32, offsets int64) to be looked up in `bpe`.
            work: the calling thread's own.
            fold, bpe: how documents become words; both None: they are words already.
            expansion: most bytes that `fold` makes of one.
        """
        as_ids = isinstance(documents, tuple)
        text, offsets = documents if as_ids else joined(documents)
        count = len(offsets) - 1
        logits, counted = np.empty(count), np.zeros(count, np.int64)
        longest = 0 if as_ids else int(np.diff(offsets).max(initial=0))
        stride = self._cache_bytes + 3 * (longest * expansion + 64) + 64
        self.run(
            "score",
            ScoreArgs(
                model, _at(text), _at(offsets), count, _at(text) if as_ids else None,
                None if fold is None else ctypes.addressof(fold),
                None if bpe is None else ctypes.addressof(bpe),
                _at(logits), _at(counted), work.address(stride), stride, expansion,
            ),
        )  # fmt: skip
        return logits, counted

    def exact(
        self,
        model: ModelArgs,
        documents: Sequence[bytes],
        inputs: np.ndarray,
        outputs: np.ndarray,
        work: Work,
    ) -> np.ndarray:
        """fastText's own probabilities, fp32 `[documents, labels]`; NaN where it gives no label.

        Args:
            model, documents, work: as for `score`.
            inputs: fp32 `[rows, dim]`, C order; may be mapped and unaligned.
            outputs: fp32 `[labels, dim]`.
        """
        text, offsets = joined(documents)
        labels, dim = outputs.shape
        shares = np.empty((len(documents), labels), np.float32)
        longest = int(np.diff(offsets).max(initial=0))
        stride = (8 * dim + 4 * labels + 8 * (longest + 2) + 256) // 64 * 64
        self.run(
            "exact",
            ExactArgs(
                model, _at(text), _at(offsets), len(documents), _at(inputs), _at(outputs),
                dim, labels, _at(shares), work.address(stride), stride,
            ),
        )  # fmt: skip
        return shares

    def words(
        self, documents: Sequence[bytes], fold: FoldArgs, expansion: int
    ) -> list[bytes | None]:
        """Each raw document's words, one space between two; None: left to Python.

        Args:
            documents: UTF-8.
            fold, expansion: as for `score`.
        """
        text, offsets = joined(documents)
        longest = int(np.diff(offsets).max(initial=0))
        folded = np.empty(longest * expansion + 64, np.uint8)
        out = np.empty(int(offsets[-1]) * expansion + 64, np.uint8)
        sizes = np.empty(len(documents) + 1, np.int64)
        self.run(
            "words",
            WordsArgs(
                _at(text), _at(offsets), len(documents), ctypes.addressof(fold), _at(folded),
                _at(out), _at(sizes),
            ),
        )  # fmt: skip
        found: list[bytes | None] = []
        begin, data = 0, memoryview(out)
        for size in sizes[:-1].tolist():
            found.append(None if size < 0 else bytes(data[begin : begin + size]))
            begin += max(size, 0)
        return found

    def minhash(
        self,
        documents: Sequence[bytes],
        fold: FoldArgs,
        expansion: int,
        factors: np.ndarray,
        ngrams: int,
        work: Work,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(signatures uint32 `[documents, hashes]`, hash of the words uint64 `[documents]`).

        Args:
            documents: UTF-8 text.
            fold, expansion: makes words separated by spaces of it.
            factors: uint64 `[2, hashes]`, the first row odd.
            ngrams: words in a shingle.
            work: the calling thread's own.
        """
        text, offsets = joined(documents)
        hashes = factors.shape[1]
        signatures = np.empty((len(documents), hashes), np.uint32)
        content = np.empty(len(documents), np.uint64)
        longest = int(np.diff(offsets).max(initial=0))
        stride = 9 * (longest * expansion + 256)
        self.run(
            "minhash",
            MinhashArgs(
                _at(text), _at(offsets), len(documents), ngrams, hashes, ctypes.addressof(fold),
                _at(factors[0]), _at(factors[1]), _at(signatures), _at(content), None, None,
                work.address(stride), stride, expansion,
            ),
        )  # fmt: skip
        return signatures, content

    def grams(
        self, documents: Sequence[bytes], fold: FoldArgs, expansion: int, ngrams: int, work: Work
    ) -> list[np.ndarray]:
        """Hashes uint64 of each document's n-grams of words, in order; the rest as `minhash`."""
        text, offsets = joined(documents)
        room = 2 * int(offsets[-1]) + len(documents) + 1
        found, counts = np.empty(room, np.uint64), np.zeros(len(documents) + 1, np.int64)
        content = np.empty(len(documents) + 1, np.uint64)
        longest = int(np.diff(offsets).max(initial=0))
        stride = 9 * (longest * expansion + 256)
        self.run(
            "minhash",
            MinhashArgs(
                _at(text), _at(offsets), len(documents), ngrams, 0, ctypes.addressof(fold),
                None, None, None, _at(content), _at(found), _at(counts),
                work.address(stride), stride, expansion,
            ),
        )  # fmt: skip
        begins = 2 * offsets[:-1] + np.arange(len(documents))
        pairs = zip(begins.tolist(), counts.tolist(), strict=False)
        return [found[begin : begin + count] for begin, count in pairs]


class Work:
    """Scratch memory of one thread, kept between calls: at its head is the cache of pieces.

    It belongs to one tokenizer: the cache does not say whose tokens it holds.
    """

    def __init__(self) -> None:
        self._memory = np.zeros(0, np.uint8)

    def address(self, size: int) -> int:
        """Of at least `size` bytes, zero when they are new."""
        if len(self._memory) < size + 64:
            # Zeros cost nothing until they are touched. The cache starts anew with them.
            self._memory = np.zeros(1 << (size + 64).bit_length(), np.uint8)
        return -(-_at(self._memory) // 64) * 64


class WorkOfThread(threading.local):
    """Work for each thread: that of `score`, which holds a cache, and that of `exact`."""

    def __init__(self) -> None:
        self.work, self.exact = Work(), Work()


def joined(documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(all bytes uint8, offsets int64 `[documents + 1]`)."""
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(d) for d in documents], out=offsets[1:])
    # One byte more: an empty array has no address.
    return np.frombuffer(b"".join(documents) + b"\0", np.uint8), offsets


@functools.cache
def library() -> tuple[Library | None, str]:
    """The library, or None and why not."""
    places = (Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "ultraclean")
    found = [file for place in places for file in sorted(place.glob("libultraclean.*"))]
    if not found:
        return None, (
            "the native scorer was not built (no C++ compiler when ultraclean was installed): "
            "install one and reinstall"
        )
    try:
        return Library(ctypes.CDLL(str(found[0]))), ""
    except OSError as error:
        return None, f"{found[0].name} does not load: {error}"


def keep(structure: Structure, *owners: Any) -> Structure:
    """The structure, with the arrays that it points into alive as long as it is."""
    structure.owners = owners  # type: ignore[attr-defined]
    return structure

"""The words of training text, counted, and the text as numbers of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ultraclean import native
from ultraclean.hashing import word_hashes
from ultraclean.native_args import FEATURE, TYPE, CountArgs, MergeArgs
from ultraclean.reference import END, tokens

_SLOTS = 1 << 16


@dataclass(frozen=True)
class Counted:
    """Training text as numbers.

    Attributes:
        tokens: int32, types of word of all documents, each document ended by the end mark's.
        starts: int64 `[documents + 1]`.
        features: FEATURE `[types]`: hash, and row of the input matrix, -1 for a type too rare.
        words: in row order: the most frequent first, of equals the one that comes first.
        counts: of the words.
    """

    tokens: np.ndarray
    starts: np.ndarray
    features: np.ndarray
    words: list[bytes]
    counts: list[int]


def count_words(
    documents: Sequence[bytes], min_count: int, threads: int = 1, backend: str = "auto"
) -> Counted:
    """Number the words of documents; the same for any number of threads.

    Args:
        documents: normalised text, UTF-8.
        min_count: rarer words get no row.
        threads: each takes a part of the documents.
        backend: `native`, `numpy`, or `auto`: native where it is there.

    Raises:
        RuntimeError: the native backend was asked for by name and is not there.
    """
    library, reason = native.library()
    if backend == "native" and library is None:
        raise RuntimeError(reason)
    if library is None or backend == "numpy":
        return _plainly(documents, min_count)
    text, offsets = native.joined(documents)
    # A part's tokens begin where they would if all before had as many as their bytes allow.
    edges = np.searchsorted(offsets, np.linspace(0, offsets[-1], threads + 1)[1:-1]).tolist()
    edges = [0, *edges, len(documents)]
    rooms = [int(offsets[d]) // 2 + 2 * d for d in edges]
    found, lengths = np.empty(rooms[-1] + 1, np.int32), np.empty(len(documents) + 1, np.int64)
    parts = [
        _Part(library, text, offsets[a : b + 1], found[room:], lengths[a:])
        for a, b, room in zip(edges, edges[1:], rooms, strict=False)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_Part.count, parts))
    whole, done = parts[0], parts[0].tokens_found
    for part, room in zip(parts[1:], rooms[1:], strict=False):
        size = part.tokens_found
        # Moved up to the part before it, and numbered as the first part numbers words.
        found[done : done + size] = whole.merge(part)[found[room : room + size]]
        done += size
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    types = whole.types[: whole.state[1]]

    def spelled(kept: np.ndarray) -> list[bytes]:
        data = memoryview(text)
        places = zip(types["begin"][kept].tolist(), types["length"][kept].tolist(), strict=True)
        return [END if begin < 0 else bytes(data[begin : begin + n]) for begin, n in places]

    return _kept(found[:done], starts, types["hash"], types["count"], types["begin"], spelled,
                 min_count)  # fmt: skip


class _Part:
    """Some of the documents, counted by one thread."""

    def __init__(
        self,
        library: native.Library,
        text: np.ndarray,
        offsets: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self._library = library
        self._held = text, offsets, tokens, lengths
        self.state = np.zeros(3, np.int64)
        self.slots, self.types = np.zeros(_SLOTS, np.uint64), np.zeros(_SLOTS // 2, TYPE)
        self._rebuild = 0

    @property
    def tokens_found(self) -> int:
        return int(self.state[2])

    def _args(self) -> CountArgs:
        text, offsets, tokens, lengths = self._held
        args = CountArgs(
            text.ctypes.data, offsets.ctypes.data, len(offsets) - 1,
            self.slots.ctypes.data, len(self.slots), self.types.ctypes.data, len(self.types),
            tokens.ctypes.data, lengths.ctypes.data, self.state.ctypes.data, self._rebuild,
        )  # fmt: skip
        self._rebuild = 0
        return args

    def _grow(self, more: int) -> None:
        while 2 * (int(self.state[1]) + more) > len(self.slots):
            self.slots = np.zeros(2 * len(self.slots), np.uint64)
            self._rebuild = 1
        grown = np.zeros(len(self.slots) // 2, TYPE)
        grown[: len(self.types)] = self.types
        self.types = grown

    def count(self) -> None:
        offsets = self._held[1]
        while True:
            self._library.run("count", self._args())
            done = int(self.state[0])
            if done == len(offsets) - 1:
                return
            self._grow(int(offsets[done + 1] - offsets[done]) // 2 + 2)

    def merge(self, other: _Part) -> np.ndarray:
        """Take another's types in; what each becomes here, int32."""
        count = int(other.state[1])
        self._grow(count)
        becomes = np.empty(count + 1, np.int32)
        args = MergeArgs(self._args(), other.types.ctypes.data, count, becomes.ctypes.data)
        self._library.run("merge", args)
        return becomes


def _plainly(documents: Sequence[bytes], min_count: int) -> Counted:
    numbers: dict[bytes, int] = {END: 0}
    found: list[int] = []
    starts = [0]
    for document in documents:
        words = tokens(document)
        found.extend(numbers.setdefault(word, len(numbers)) for word in words)
        starts.append(len(found))
    spelled = list(numbers)
    counts = np.bincount(np.array(found, np.int64), minlength=len(spelled))
    hashes = word_hashes(spelled).astype(np.uint32)
    order = np.arange(len(spelled)) - 1  # by first appearance; the end mark first of all
    return _kept(np.array(found, np.int32), np.array(starts, np.int64), hashes, counts, order,
                 lambda kept: [spelled[i] for i in kept.tolist()], min_count)  # fmt: skip


def _kept(
    found: np.ndarray,
    starts: np.ndarray,
    hashes: np.ndarray,
    counts: np.ndarray,
    first: np.ndarray,
    spelled: Callable[[np.ndarray], list[bytes]],
    min_count: int,
) -> Counted:
    """Rows for the types that come often enough."""
    features = np.zeros(len(hashes), FEATURE)
    features["hash"], features["row"] = hashes, -1
    often = np.flatnonzero(counts >= min_count)
    often = often[np.lexsort((first[often], -counts[often]))]
    features["row"][often] = np.arange(len(often))
    return Counted(found, starts, features, spelled(often), counts[often].tolist())

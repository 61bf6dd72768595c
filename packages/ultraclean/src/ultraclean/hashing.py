"""fastText's word hash for many words at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BASIS, _PRIME = 2166136261, 16777619
# With fewer words than this left, a Python loop over the rest is quicker than a NumPy step a byte.
_FEW = 12


def word_hashes(words: Sequence[bytes]) -> np.ndarray:
    """FNV-1a over signed bytes, as the n-gram arithmetic uses it.

    Args:
        words: UTF-8; any number, any length.

    Returns:
        uint64 `[words]`: the 32-bit hash sign-extended to 64 bits, since the library carries it
        through a signed 32-bit integer.
    """
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    text = np.frombuffer(b"".join(words), np.int8)
    starts = np.cumsum(lengths) - lengths
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    state = np.full(len(words), _BASIS, np.uint32)
    prime = np.uint32(_PRIME)
    alive, position = len(words), 0
    while True:
        # Words that still have a byte here are the first `alive`.
        alive = int(np.searchsorted(-lengths[:alive], -position, side="left"))
        if alive <= _FEW:
            break
        # int8 to uint32 wraps a byte above 127 the way a signed char does.
        state[:alive] = (state[:alive] ^ text[starts[:alive] + position].astype(np.uint32)) * prime
        position += 1
    for i in range(alive):
        h = int(state[i])
        for byte in text[starts[i] + position : starts[i] + lengths[i]].tolist():
            h = ((h ^ (byte & 0xFFFFFFFF)) * _PRIME) & 0xFFFFFFFF
        state[i] = h
    hashes = np.empty(len(words), np.uint64)
    hashes[longest_first] = state.view(np.int32).astype(np.int64).view(np.uint64)
    return hashes

"""Keys and values of the tokens seen so far, in memory that grows with them."""

from __future__ import annotations

import torch
from torch import Tensor

from cpmcu.spec import ModelSpec

_FIRST = 256  # positions


class KVCache:
    """Per layer one arena [2, kv_heads, capacity, head_dim]: keys, then values.

    The capacity doubles layer by layer up to `max_context`, so growing copies one layer at a
    time and a short chat never holds the memory of a long one. `length` tokens are valid.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, max_context: int) -> None:
        self._heads, self._head_dim, self._dtype = spec.kv_heads, spec.head_dim, dtype
        self.max_context = max_context
        self.layers = [self._arena(0) for _ in range(spec.layers)]
        self.length = 0

    def _arena(self, capacity: int) -> Tensor:
        return torch.empty(2, self._heads, capacity, self._head_dim, dtype=self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes now held."""
        return sum(arena.numel() * arena.element_size() for arena in self.layers)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every layer; the valid ones stay."""
        assert length <= self.max_context, (length, self.max_context)
        capacity = self.layers[0].shape[2]
        if length <= capacity:
            return
        capacity = min(self.max_context, max(_FIRST, length, 2 * capacity))
        for i, old in enumerate(self.layers):
            self.layers[i] = self._arena(capacity)
            self.layers[i][:, :, : self.length] = old[:, :, : self.length]


def bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize

"""Keys and values of the tokens seen so far, in memory that grows with them."""

from __future__ import annotations

import torch
from torch import Tensor

from cpmcu.spec import ModelSpec

_FIRST = 256  # positions


class KVCache:
    """Per layer one arena [2, kv_heads, capacity, head_dim]: keys, then values. With sparse
    attention two more hold the compressed keys of all complete kernels, `fine` and `coarse`
    [kv_heads, kernels, head_dim]. What lies behind `length` tokens is not valid.

    The capacity doubles layer by layer up to `max_context`, so growing copies one layer at a
    time and a short chat never holds the memory of a long one.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, max_context: int) -> None:
        self._heads, self._head_dim, self._dtype = spec.kv_heads, spec.head_dim, dtype
        self.sparse, self.max_context = spec.sparse, max_context
        self.layers = [self._arena(2, self._heads, 0) for _ in range(spec.layers)]
        count = spec.layers if spec.sparse else 0
        self.fine, self.coarse = (
            [self._arena(self._heads, 0) for _ in range(count)] for _ in range(2)
        )
        self.length = 0

    def _arena(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self._head_dim, dtype=self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes now held."""
        return sum(x.nbytes for x in (*self.layers, *self.fine, *self.coarse))

    def kernels(self) -> tuple[int, int]:
        """Fine and coarse kernels that are complete."""
        return self.sparse.kernels(self.length) if self.sparse else (0, 0)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every layer; the valid ones stay."""
        assert length <= self.max_context, (length, self.max_context)
        capacity = self.layers[0].shape[2]
        if length <= capacity:
            return
        capacity = min(self.max_context, max(_FIRST, length, 2 * capacity))
        for i, old in enumerate(self.layers):
            self.layers[i] = self._arena(2, self._heads, capacity)
            self.layers[i][:, :, : self.length] = old[:, :, : self.length]
        if self.sparse is None:
            return
        for held, valid, room in zip(
            (self.fine, self.coarse), self.kernels(), self.sparse.kernels(capacity), strict=True
        ):
            for i, old in enumerate(held):
                held[i] = self._arena(self._heads, room)
                held[i][:, :valid] = old[:, :valid]


def cache_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of keys, values and compressed keys of `tokens` tokens in all layers."""
    rows = 2 * tokens + (sum(spec.sparse.kernels(tokens)) if spec.sparse else 0)
    return rows * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize


def bytes_read(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> float:
    """Bytes of them that decoding one more token reads."""
    if spec.sparse is None or tokens < spec.sparse.least_keys:
        return cache_bytes(spec, dtype, tokens)
    visited = spec.sparse.budget * spec.sparse.block_size
    rows = 2 * visited + sum(spec.sparse.kernels(tokens))
    return rows * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize

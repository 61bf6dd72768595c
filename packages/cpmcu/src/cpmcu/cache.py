"""Keys and values of the tokens seen so far, in memory that grows with them."""

from __future__ import annotations

from typing import Any

from cpmcu import dtypes, huge_pages
from cpmcu._torch import torch
from cpmcu.int8_rows import SCALE_BYTES
from cpmcu.spec import ModelSpec

_FIRST = 256  # positions
_FIRST_ON_GPU = 1024


class KVCache:
    """Per layer one arena [2, kv_heads, capacity, head_dim]: keys, then values. With sparse
    attention two more hold the compressed keys of all complete kernels, `fine` and `coarse`
    [kv_heads, kernels, head_dim]. What lies behind `length` tokens is not valid. With
    `spec.int8_cache` the rows of keys and values are those of `int8_rows`.

    The capacity grows by a quarter, up to `max_context`, layer by layer: growing copies one layer
    at a time, and a short chat never holds the memory of a long one. On a GPU it doubles, for
    what is recorded there is recorded again when the memory moves.

    With a PyTorch `device` the arenas are tensors on it, with None NumPy's arrays (`dtypes`).
    """

    def __init__(
        self, spec: ModelSpec, dtype: str, max_context: int, device: torch.device | None = None
    ) -> None:
        self._heads, self._head_dim = spec.kv_heads, spec.head_dim
        self._dtype = dtypes.name_of(dtype)
        self.device = device
        self.sparse, self.max_context = spec.sparse, max_context
        self._int8 = spec.int8_cache
        self.layers = [self._rows(0) for _ in range(spec.layers)]
        count = spec.layers if spec.sparse else 0
        self.fine, self.coarse = (
            [self._arena(self._heads, 0) for _ in range(count)] for _ in range(2)
        )
        self.length = 0
        self.place = object()  # another one whenever the arenas have moved

    @property
    def dtype(self) -> str:
        """Of what the rows hold: the engine's, or "int8"."""
        return "int8" if self._int8 else self._dtype

    @property
    def floats(self) -> str:
        """Of the compressed keys: the engine's dtype."""
        return self._dtype

    @property
    def _on_gpu(self) -> bool:
        return self.device is not None and self.device.type != "cpu"

    def _empty(self, *shape: int, dtype: str) -> Any:
        if self._on_gpu:
            return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        array = huge_pages.empty(*shape, dtype=dtypes.STORED[dtype])
        return array if self.device is None else dtypes.to_torch(array, dtype)

    def _arena(self, *shape: int) -> Any:
        return self._empty(*shape, self._head_dim, dtype=self._dtype)

    def _rows(self, capacity: int) -> Any:
        if not self._int8:
            return self._arena(2, self._heads, capacity)
        width = self._head_dim + SCALE_BYTES
        return self._empty(2, self._heads, capacity, width, dtype="int8")

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
        if self._on_gpu:
            more = max(_FIRST_ON_GPU, length, capacity * 2)
        else:
            more = max(_FIRST, length, capacity * 5 // 4)
        capacity, self.place = min(self.max_context, more), object()
        for i, old in enumerate(self.layers):
            self.layers[i] = self._rows(capacity)
            self.layers[i][:, :, : self.length] = old[:, :, : self.length]
        if self.sparse is None:
            return
        for held, valid, room in zip(
            (self.fine, self.coarse), self.kernels(), self.sparse.kernels(capacity), strict=True
        ):
            for i, old in enumerate(held):
                held[i] = self._arena(self._heads, room)
                held[i][:, :valid] = old[:, :valid]


def cache_bytes(spec: ModelSpec, dtype: str, tokens: int) -> int:
    """Bytes of keys, values and compressed keys of `tokens` tokens in all layers."""
    compressed = sum(spec.sparse.kernels(tokens)) if spec.sparse else 0
    return _bytes(spec, dtype, tokens, compressed)


def _bytes(spec: ModelSpec, dtype: str, tokens: int, compressed: int) -> int:
    plain = spec.head_dim * dtypes.size_of(dtype)
    row = spec.head_dim + SCALE_BYTES if spec.int8_cache else plain
    return spec.layers * spec.kv_heads * (2 * tokens * row + compressed * plain)


def bytes_read(spec: ModelSpec, dtype: str, tokens: int) -> float:
    """Bytes of them that decoding one more token reads."""
    if spec.sparse is None or tokens < spec.sparse.least_keys:
        return cache_bytes(spec, dtype, tokens)
    visited = spec.sparse.budget * spec.sparse.block_size
    return _bytes(spec, dtype, visited, sum(spec.sparse.kernels(tokens)))

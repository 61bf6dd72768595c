"""Keys and values of one layer, and their compressed keys, kept between calls.

Appending a token costs what the token costs: buffers grow geometrically, and a compressed key is
made once, when its last token arrives. Taking tokens back (rejected speculation) only moves the
end, for a kernel depends on nothing after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm2.compression import CompressedKeys, kernel_counts, write_kernels
from infllm2.config import InfLLMv2Config

# A buffer that is full grows to this many times what it must hold.
GROWTH = 1.5


class LayerCache:
    """Cache of one attention layer; all rows have one length.

    Args:
        config: sizes of the kernels.

    Attributes:
        keys, values: `[B, Hkv, length, D]`, views of the buffers; None before the first update.
            Tokens that come after a `crop` overwrite what older views show.
        length: tokens held.
        key_buffer, value_buffer: what keys and values are views of: `[B, Hkv, room, D]`, or None.
        step: what is kept between decoding steps, by `infllm2.attention`.
    """

    def __init__(self, config: InfLLMv2Config) -> None:
        self.config = config
        self.length = 0
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.step: Any = None
        # By (rows, first token): kernels of left-padded rows are counted from their own start.
        self._kernels: dict[tuple[tuple[int, ...] | None, int], _Kernels] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own decoding step: this one points into our memory."""
        return {**self.__dict__, "step": None}

    @property
    def keys(self) -> Tensor | None:
        """`[B, Hkv, length, D]`."""
        return None if self.key_buffer is None else self.key_buffer[:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        """`[B, Hkv, length, D]`."""
        return None if self.value_buffer is None else self.value_buffer[:, :, : self.length]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens, and return everything.

        Args:
            k: keys of the new tokens, `[B, Hkv, T, D]`, of the batch, heads, dtype and device so
                far.
            v: their values, `[B, Hkv, T, ·]`.

        Returns:
            Keys and values of all tokens. No gradient flows back through them: a backward pass
            that comes to them raises a RuntimeError.

        Raises:
            ValueError: they do not fit each other or what is held, which stays as it is.
        """
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                "new keys and values must be [batch, key-value heads, length, head size] of one "
                f"batch, heads and length, got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        for name, x, held in (("keys", k, self.key_buffer), ("values", v, self.value_buffer)):
            if held is not None and _kind(x) != _kind(held):
                raise ValueError(
                    f"new {name} {tuple(x.shape)} of {x.dtype} on {x.device} do not fit the cache "
                    f"of {tuple(held[:, :, : self.length].shape)} of {held.dtype} on "
                    f"{held.device}: one cache serves one batch, reset() it for another"
                )
        end = self.length + k.shape[2]
        self.key_buffer, self.value_buffer = (
            self._grown(self.key_buffer, k, end),
            self._grown(self.value_buffer, v, end),
        )
        self.key_buffer[:, :, self.length : end] = k.detach()
        self.value_buffer[:, :, self.length : end] = v.detach()
        self.length = end
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return _Held.apply(self.keys, k), _Held.apply(self.values, v)
        return self.keys, self.values

    def check_sizes(self, config: InfLLMv2Config) -> None:
        """Check that compressed keys are what attention with `config` needs.

        Raises:
            ValueError: the cache was made with other sizes.
        """
        sizes = ("kernel_size", "kernel_stride", "block_size", "budget")
        ours, theirs = ([getattr(c, name) for name in sizes] for c in (self.config, config))
        if ours != theirs:
            raise ValueError(
                f"the cache was made for ({', '.join(sizes)}) = {ours}, attention runs with "
                f"{theirs}: make it from the same InfLLMv2Config"
            )

    def _grown(self, buffer: Tensor | None, like: Tensor, needed: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= needed:
            return buffer
        B, K, _, D = like.shape
        self.step = None  # it would keep the old buffer alive
        block = self.config.block_size
        # The first call is a prompt, most often: room for an answer, not half as much again.
        size = needed + 4 * block if buffer is None else int(GROWTH * needed) + block
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            wider = like.new_empty(B, K, -(-size // block) * block, D)
        if buffer is not None:
            wider[:, :, : self.length] = buffer[:, :, : self.length]
        return wider

    def compressed(
        self, start: int = 0, end: int | None = None, rows: tuple[int, ...] | None = None
    ) -> CompressedKeys:
        """Compressed keys of tokens start … end − 1, kernels counted from `start`.

        Args:
            start: first token (after left padding).
            end: the token after the last; all by default.
            rows: rows of the batch; all by default.
        """
        assert self.key_buffer is not None
        end = self.length if end is None else end
        if end - start <= self.config.budget * self.config.block_size:  # nothing to choose
            none = self.key_buffer[:, :, :0] if rows is None else self.key_buffer[list(rows), :, :0]
            return CompressedKeys(none, none, end - start)
        kernels = self._kernels.setdefault((rows, start), _Kernels(self.config))
        return kernels.up_to(self.key_buffer, rows, start, end)

    @property
    def kernels(self) -> _Kernels | None:
        """Compressed keys of whole rows; None as long as nobody asked for any."""
        return self._kernels.get((None, 0))

    def crop(self, length: int) -> None:
        """Forget tokens from `length` on; nothing happens if there are none."""
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        self.length = min(self.length, length)
        for (_, start), kernels in self._kernels.items():
            kernels.crop(max(0, self.length - start))

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row rows[i] was: beam search, batch selection, repetition.

        Args:
            rows: int64 `[new batch]`.
        """
        if self.key_buffer is None:
            return
        rows, self.step = rows.to(self.key_buffer.device), None
        with torch.inference_mode(False):
            self.key_buffer, self.value_buffer = self.key_buffer[rows], self.value_buffer[rows]
        whole = {key: kernels for key, kernels in self._kernels.items() if key[0] is None}
        for kernels in whole.values():
            kernels.reorder(rows)
        self._kernels = whole  # those of single rows are made anew where they are needed

    def reset(self) -> None:
        """Forget everything, buffers too."""
        self.length, self.key_buffer, self.value_buffer, self.step = 0, None, None, None
        self._kernels = {}


def store_of(cache: Any) -> LayerCache:
    """The `LayerCache` behind what a caller passed as the cache of one layer.

    Raises:
        ValueError: there is none.
    """
    store = getattr(cache, "store", cache)  # a layer of `SparseCache` has one
    if not isinstance(store, LayerCache):
        raise ValueError(
            "cache must be a LayerCache(config), or one layer of a SparseCache (cache.layers[i]), "
            f"got {type(cache).__name__}"
        )
    return store


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape[0], x.shape[1], x.shape[3], x.dtype, x.device


class _Held(torch.autograd.Function):
    """What a cache holds, as something the new tokens take part in: so backward finds out."""

    @staticmethod
    def forward(ctx: Any, held: Tensor, new: Tensor) -> Tensor:
        return held.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "no gradient flows through an infllm2 cache: train without one (use_cache=False, or no "
            "past_key_values)"
        )


class _Kernels:
    """Growing buffers of fine and coarse kernels of some rows from some token on."""

    def __init__(self, config: InfLLMv2Config) -> None:
        self.config = config
        self.length = 0
        self.fine: Tensor | None = None
        self.coarse: Tensor | None = None

    def up_to(
        self, keys: Tensor, rows: tuple[int, ...] | None, start: int, end: int
    ) -> CompressedKeys:
        """Kernels of tokens start … end − 1 of the buffer `keys`."""
        length = end - start
        fine, coarse = kernel_counts(length, self.config)
        if length > self.length:
            had = kernel_counts(self.length, self.config)
            if fine > had[0] or coarse > had[1] or self.fine is None:
                part, batch = keys[:, :, start:end], keys.shape[0] if rows is None else len(rows)
                self.fine = _grown(self.fine, part, batch, had[0], fine)
                self.coarse = _grown(self.coarse, part, batch, had[1], coarse)
                # Row by row where some are left out: views, where indexing would copy all keys.
                whole = slice(None)
                pairs = [(whole, whole)]
                if rows is not None:
                    pairs = [(slice(i, i + 1), slice(r, r + 1)) for i, r in enumerate(rows)]
                for to, row in pairs:
                    write_kernels(part[row], self.config, self.fine[to], self.coarse[to], had)
            self.length = length
        assert self.fine is not None and self.coarse is not None
        return CompressedKeys(self.fine[:, :, :fine], self.coarse[:, :, :coarse], length)

    def crop(self, length: int) -> None:
        """Tokens from `length` on will come again, and be others."""
        self.length = min(self.length, length)

    def reorder(self, rows: Tensor) -> None:
        """Rows of the batch in another order."""
        if self.fine is not None:
            with torch.inference_mode(False):
                self.fine, self.coarse = self.fine[rows], self.coarse[rows]


def _grown(buffer: Tensor | None, like: Tensor, batch: int, had: int, needed: int) -> Tensor:
    """A buffer of at least `needed` kernels; its first `had` are kept."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    with torch.inference_mode(False):
        wider = like.new_empty(batch, like.shape[1], int(GROWTH * needed) + 16, like.shape[3])
    if buffer is not None:
        wider[:, :, :had] = buffer[:, :, :had]
    return wider

"""Attention on a GPU: of a chunk of a prompt, and of one token whose position is in GPU memory.

The new keys and values are in the cache already. A token beyond `spec.sparse.least_keys`
attends to the blocks that InfLLM v2 chooses, by `infllm2`'s Triton kernels.
Letters: T new tokens, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmcu.cache import KVCache
from cpmcu.spec import ModelSpec


def is_supported(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether attention like this can run, and why not."""
    if spec.int8_cache:
        return False, "keys and values have the engine's dtype here: take kv='auto'"
    if spec.head_dim > 256:
        return False, f"heads of at most 256, got {spec.head_dim}"
    if spec.sparse is None:
        return True, ""
    if importlib.util.find_spec("infllm2") is None:
        return False, "sparse attention needs infllm2: pip install minicpm4-infllm2"
    if spec.window is not None:
        return False, "sparse attention in a model with sliding windows is not implemented"
    from infllm2 import backends

    inputs = backends.Inputs(device.type, dtype, spec.heads, spec.kv_heads, spec.head_dim)
    return backends.get("triton").is_supported(inputs)


def _config(spec: ModelSpec) -> Any:
    """The sizes, for infllm2; the dense switch is ours."""
    from infllm2 import InfLLMv2Config

    return InfLLMv2Config(**{**asdict(spec.sparse), "dense_len": -1})


class Chunk:
    """Tokens start … end − 1 of a sequence, in plain launches.

    Args:
        spec: the model.
        cache: with room for `end` tokens.
        start: tokens before.
        end: tokens after.
        sparse: whether these tokens attend to blocks; they all do, or none.
    """

    def __init__(
        self, spec: ModelSpec, cache: KVCache, start: int, end: int, *, sparse: bool
    ) -> None:
        self._spec, self._cache, self._start, self._end, self._sparse = (
            spec, cache, start, end, sparse
        )  # fmt: skip
        self.layers = cache.layers
        self._mask: Any = None
        if spec.window is not None and end > spec.window:
            mask = torch.ones(end - start, end, dtype=torch.bool, device=cache.device)
            self._mask = mask.tril_(start).triu_(start - spec.window + 1)
        elif start:
            from torch.nn.attention.bias import causal_lower_right  # a second to import

            self._mask = causal_lower_right(end - start, end)

    def attend(self, layer: int, q: Tensor, position: Tensor, keys: Tensor) -> Tensor:
        """Attention outputs [T, H * D].

        Args:
            layer: index of the layer.
            q: [T, H, D], rotated.
            position: int64 [1] on the GPU: of the first of these tokens.
            keys: likewise: how many there are in the end.
        """
        k, v = self.layers[layer][:, None, :, : self._end]
        q = q[None].transpose(1, 2)
        if self._spec.sparse is not None:
            self._compress(layer, k)
        if self._sparse:
            out = self._visit(layer, q, k, v)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self._mask, is_causal=self._mask is None, enable_gqa=True
            )
        return out[0].transpose(0, 1).flatten(1)

    def _compress(self, layer: int, k: Tensor) -> None:
        """Write the compressed keys that are complete now."""
        from infllm2.compression import write_kernels

        fine, coarse = self._cache.fine[layer][None], self._cache.coarse[layer][None]
        had = self._spec.sparse.kernels(self._start)
        write_kernels(k, _config(self._spec), fine, coarse, had)

    def _visit(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sparse attention [1, H, T, D]."""
        from infllm2 import backends

        triton, config = backends.get("triton"), _config(self._spec)
        fine, coarse = (
            held[layer][None, :, :count]
            for held, count in zip(
                (self._cache.fine, self._cache.coarse), self._spec.sparse.kernels(self._end),
                strict=True,
            )
        )  # fmt: skip
        blocks = triton.select(q, fine, coarse, self._end, config)
        scale = self._spec.head_dim**-0.5
        return triton.attend(q, k, v, blocks, block_size=config.block_size, scale=scale)[0]


class One:
    """One token at a position that is read on the GPU: every launch is the same for all positions.

    Args:
        spec: the model.
        cache: its memory is used as it is now; when it grows, make another.
        sparse: whether the token attends to blocks.
    """

    def __init__(self, spec: ModelSpec, cache: KVCache, *, sparse: bool) -> None:
        self._spec, self._sparse, self.layers = spec, sparse, list(cache.layers)
        self._fine, self._coarse = list(cache.fine), list(cache.coarse)

    def memory(self) -> list[Tensor]:
        """The cache's, that it reads and writes."""
        return [*self.layers, *self._fine, *self._coarse]

    def attend(self, layer: int, q: Tensor, position: Tensor, keys: Tensor) -> Tensor:
        """As `Chunk.attend`, T = 1."""
        from cpmcu import triton_compress, triton_decode

        k, v = self.layers[layer]
        if self._spec.sparse is not None:
            fine, coarse = self._fine[layer], self._coarse[layer]
            triton_compress.compress(k, fine, coarse, position, self._spec.sparse)
        if self._sparse:
            from infllm2 import backends

            memory = (x[None] for x in (k, v, fine, coarse))
            decode = backends.get("triton").decode
            out = decode(q[None].transpose(1, 2), *memory, keys, _config(self._spec))
        else:
            out = triton_decode.decode(q[0], k, v, position, window=self._spec.window)
        return out.view(1, -1)

"""A transformers cache that also keeps the compressed keys of InfLLM v2.

    model.generate(..., past_key_values=SparseCache(config))

Inside `sparse(model, config)` the attention function finds the compressed keys by the key tensor
that `update` returns, so a decoding step compresses nothing but what is new.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from infllm2.config import InfLLMv2Config
from infllm2.layer_cache import LayerCache


class SparseLayer(CacheLayerMixin):
    """One layer: `LayerCache` behind transformers' interface."""

    is_sliding = False
    is_croppable = True

    def __init__(self, config: InfLLMv2Config) -> None:
        self.store = LayerCache(config)
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """`[B, Hkv, length, D]`, or None."""
        return self.store.keys

    @property
    def values(self) -> Tensor | None:
        """`[B, Hkv, length, D]`, or None."""
        return self.store.values

    @keys.setter
    def keys(self, value: None) -> None:
        _refuse(value)

    @values.setter
    def values(self, value: None) -> None:
        _refuse(value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; memory is taken by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values so far `[B, Hkv, length, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.store.update(key_states, value_states)
        keys.infllm2_cache = self.store
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys after `query_length` more tokens, 0)."""
        return self.store.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.store.length

    def get_max_length(self) -> int:
        """−1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Args:
            tokens_to_remove: minus their number, as transformers counts.

        Raises:
            ValueError: a positive number, which older versions took for the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}: pass "
                "length_to_keep - cache.get_seq_length()"
            )
        self.store.crop(max(0, self.store.length + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one beside the other."""
        if self.store.length:
            rows = torch.arange(self.store.keys.shape[0]).repeat_interleave(repeats)
            self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if self.store.length:
            rows = torch.arange(self.store.keys.shape[0], device=indices.device)[indices]
            self.reorder_cache(rows)


def _refuse(value: Tensor | None) -> None:
    """The base class sets None first; more would part the keys from their compressed ones."""
    if value is not None:
        raise AttributeError("keys and values of a SparseCache change through update and crop only")


class SparseCache(Cache):
    """Cache of a whole model.

    Args:
        config: what the model runs with in `sparse(model, config)`; its kernel sizes must agree.
    """

    def __init__(self, config: InfLLMv2Config) -> None:
        if not isinstance(config, InfLLMv2Config):
            raise ValueError(f"config must be an InfLLMv2Config, got {type(config).__name__}")
        self.config = config
        super().__init__(layer_class_to_replicate=functools.partial(SparseLayer, config))

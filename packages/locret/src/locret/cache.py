"""A transformers cache in which heads never hold more than budget + chunk entries."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from locret.config import LocretConfig
from locret.layer_store import LayerStore


class LocretCache(Cache):
    """Hand it to a model as `past_key_values` inside `with locret(model, heads, config)`.

    Args:
        config: sizes.

    Attributes:
        seen: int64 `[B, 1]`, real tokens that each row has read; None before the first.
        evicting: whether the running call evicts after each layer (a chunk of a prompt) or only
            when there is no room (the prompt's tail, and decoding).
        valid: bool `[B, T]` of the running call's tokens; None where there is no padding.
        last: bool `[B]`, rows whose prompt ends with the running call; None for none.
    """

    is_compileable = False

    def __init__(self, config: LocretConfig) -> None:
        if not isinstance(config, LocretConfig):
            raise ValueError(f"config must be a LocretConfig, got {type(config).__name__}")
        super().__init__(layers=[])
        self.config = config
        self.seen: Tensor | None = None
        self.columns = 0
        self.evicting = False
        self.valid: Tensor | None = None
        self.last: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer; see `LayerStore.update`."""
        return self.layer(layer_idx).update(key_states, value_states)

    def layer(self, number: int) -> LayerStore:
        """The store of a layer, made on first use."""
        while len(self.layers) <= number:
            self.layers.append(LayerStore(self.config))
        return self.layers[number]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the input read so far: from here `generate` goes on."""
        return self.columns

    def fork(self) -> LocretCache:
        """A copy that can be decoded from, again and again, without reading the text again."""
        twin = LocretCache(self.config)
        twin.__dict__.update(self.__dict__)
        twin.layers = [layer.fork() for layer in self.layers]
        return twin

    def kept(self) -> list[Tensor]:
        """By layer, positions in the text that each head holds, int32 `[B, J, n]`; −1: none."""
        found = []
        for layer in self.layers:
            positions = layer.positions.clone()
            if layer.valid is not None:
                positions.masked_fill_(~layer.valid, -1)
            found.append(positions)
        return found

    def kv_bytes(self) -> int:
        """Bytes of all keys and values held now."""
        return sum(layer.kv_bytes() for layer in self.layers)

    def note_bytes(self) -> int:
        """Bytes of what is noted of them, such as scores and positions."""
        return sum(layer.note_bytes() for layer in self.layers)

    @property
    def peak(self) -> int:
        """The most entries that any head ever held."""
        return max((layer.peak for layer in self.layers), default=0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Beam search and many samples of one prompt would need this."""
        raise ValueError(
            "LocretCache keeps one continuation for each row: repeat the rows of the input instead "
            "of asking for beams or several return sequences"
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """See `batch_repeat_interleave`."""
        self.batch_repeat_interleave(0)

    def crop(self, max_length: int) -> None:
        """What was evicted cannot come back."""
        raise ValueError("LocretCache cannot go back: keep cache.fork() of the state to return to")

"""What one layer's cache holds: keys, values, where they stood, and what they are worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from locret.config import LocretConfig
from locret.eviction import keep
from locret.quantised import dequantise, quantise

BUFFERS = ("keys", "values", "key_scales", "value_scales", "scores", "positions")


class LayerStore(CacheLayerMixin):
    """A buffer of at most budget + chunk entries for each head; tokens are appended in place.

    Attributes:
        held: entries of each head now.
        peak: the most there ever were.
        valid: bool `[B, held]`, False for padding; None where there is none.
        state: whatever a scorer keeps of this layer.
    """

    is_compileable = False

    def __init__(self, config: LocretConfig) -> None:
        super().__init__()
        self.config = config
        self.held = self.peak = self.columns = 0
        self.valid: Tensor | None = None
        self.state: dict[str, Any] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and sizes from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        b, j, _, d = key_states.shape
        coded = self.config.storage == "int8"
        kind = torch.int8 if coded else self.dtype
        self.keys = key_states.new_empty(b, j, 0, d, dtype=kind)
        self.values = value_states.new_empty(b, j, 0, value_states.shape[-1], dtype=kind)
        # One scale an entry where entries are integers; none otherwise.
        scale = torch.empty(b, j, 0, int(coded), device=self.device)
        self.key_scales, self.value_scales = scale, scale.clone()
        self.scores = torch.empty(b, j, 0, device=self.device)
        self.positions = torch.empty(b, j, 0, dtype=torch.int32, device=self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, J, T, D]`; returns all keys and values held.

        Raises:
            ValueError: more tokens than there is room for, outside `with locret(...)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.held + new > self.config.capacity:
            raise ValueError(
                f"{new} tokens do not fit beside the {self.held} held (budget + chunk = "
                f"{self.config.capacity}): call the model inside `with locret(model, heads, "
                "config)`, which reads long texts in chunks"
            )
        self._grow(self.held + new)
        self._put("key", self.held, key_states)
        self._put("value", self.held, value_states)
        self.held += new
        self.columns += new
        self.peak = max(self.peak, self.held)
        return self.all("key"), self.all("value")

    def all(self, name: str) -> Tensor:
        """Keys or values `[B, J, held, D]` in the model's dtype; name is "key" or "value"."""
        stored = getattr(self, f"{name}s")[:, :, : self.held]
        if self.config.storage == "model":
            return stored
        return dequantise(stored, getattr(self, f"{name}_scales")[:, :, : self.held], self.dtype)

    def _put(self, name: str, at: int, entries: Tensor) -> None:
        """Write entries `[B, J, T, D]` into the buffer from place `at`."""
        part = slice(at, at + entries.shape[2])
        if self.config.storage == "int8":
            entries, scales = quantise(entries)
            getattr(self, f"{name}_scales")[:, :, part] = scales
        getattr(self, f"{name}s")[:, :, part] = entries

    def note(self, scores: Tensor, positions: Tensor, valid: Tensor | None) -> None:
        """What is known of the last T entries: scores `[B, J, T]`, positions and valid `[B, T]`."""
        new = slice(self.held - positions.shape[1], self.held)
        self.scores[:, :, new] = scores
        self.positions[:, :, new] = positions[:, None].to(torch.int32)
        if valid is not None or self.valid is not None:
            before = self.valid
            if before is None:
                before = positions.new_ones(positions.shape[0], new.start, dtype=torch.bool)
            after = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            self.valid = torch.cat([before, after], dim=1)

    def counts(self) -> Tensor | int:
        """Real entries of each row: `[B, 1]`, or one number where no row has padding."""
        return self.held if self.valid is None else self.valid.sum(1, keepdim=True)

    def evict(self, last: Tensor | None, move: Any = None, due: Tensor | None = None) -> None:
        """Keep the budget's best.

        Args:
            last, due: see `eviction.keep`.
            move: `(keys [B, J, m, D], by [B, J, m]) -> keys`, which turns keys by so many
                positions: with it what stays is renumbered 0, 1, 2 …
        """
        if self.held <= self.config.budget and self.valid is None:
            return
        now = slice(0, self.held)
        index, left = keep(
            self.scores[:, :, now], self.positions[:, :, now], self.valid, last, self.config, due
        )
        m = index.shape[2]
        keys, values = _gather(self.all("key"), index), _gather(self.all("value"), index)
        if move is not None:
            if self.valid is None:
                place = index
            else:
                rank = (self.valid.cumsum(1) - 1)[:, None].expand(-1, index.shape[1], -1)
                place = rank.gather(2, index)
            keys = move(keys, torch.arange(m, device=index.device) - place)
        self._put("key", 0, keys)
        self._put("value", 0, values)
        self.scores[:, :, :m] = self.scores.gather(2, index)
        self.positions[:, :, :m] = self.positions.gather(2, index)
        self.held, self.valid = m, left
        if move is not None:
            self.state.pop("queries", None)  # they were turned for the old places

    def get_seq_length(self) -> int:
        """Columns of the input seen so far, evicted ones and padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What transformers' mask would span; Locret's attention makes its own."""
        return self.columns + int(query_length), 0

    def get_max_length(self) -> int:
        """−1: texts of any length may be read."""
        return -1

    def kv_bytes(self) -> int:
        """Bytes of the keys and values held now, and of their scales."""
        if not self.is_initialized:
            return 0
        buffers = (getattr(self, name) for name in BUFFERS[:4])
        return sum(x[:, :, : self.held].numel() * x.element_size() for x in buffers)

    def _grow(self, wanted: int) -> None:
        room = self.keys.shape[2]
        if wanted <= room:
            return
        # Doubling, up to all that will ever be needed: short texts do not pay for the budget.
        room = min(max(wanted, 2 * room), self.config.capacity)
        for name in BUFFERS:
            old = getattr(self, name)
            shape = list(old.shape)
            shape[2] = room
            fresh = old.new_empty(shape)
            fresh[:, :, : self.held] = old[:, :, : self.held]
            setattr(self, name, fresh)


def _gather(entries: Tensor, index: Tensor) -> Tensor:
    return entries.gather(2, index[..., None].expand(-1, -1, -1, entries.shape[-1]))

"""What one layer's cache holds: keys, values, where they stood, and what they are worth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from locret.config import LocretConfig
from locret.entries import Entries, PackedEntries
from locret.eviction import keep
from locret.merging import merged

# (keys [B, J, m, D], by [B, J, m]) -> keys, turned by so many positions
Turn = Callable[[Tensor, Tensor], Tensor]


class LayerStore(CacheLayerMixin):
    """At most ceiling + chunk entries for each head, and notes on each; tokens are appended.

    Attributes:
        held: columns now: the entries of the head that has most.
        peak: the most entries that any head ever held.
        evicted: whether it was ever cut; before, an entry's place is its position.
        scores: float32 `[B, J, held]`.
        positions: int32 `[B, J, held]`, in the text.
        valid: bool `[B, J, held]`, False where a head holds nothing, or padding; None: nowhere.
        masses: float32 `[B, J, held]`, entries that each stands for; None without merging.
        turns: int32 `[B, J, held]`, positions that coded keys have moved by since they were coded;
            None where keys are not coded, or have not moved.
        foretold: float32 `[B, J, held]`, the score of each entry when it came, whatever `scores`
            are since; None without a scorer that wants it.
        state: whatever a scorer keeps of this layer.
    """

    is_compileable = False

    def __init__(self, config: LocretConfig) -> None:
        super().__init__()
        self.config = config
        self.held = self.peak = self.columns = 0
        self.evicted = False
        self.entries: Entries | None = None
        self.scores = self.positions = torch.empty(0, 0, 0)
        self.valid: Tensor | None = None
        self.masses: Tensor | None = None
        self.foretold: Tensor | None = None
        self.turns: Tensor | None = None
        self.turn: Turn | None = None
        self.state: dict[str, Any] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and sizes from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        kind = Entries if self.config.budgets == "uniform" else PackedEntries
        most = self.config.ceiling + self.config.chunk
        self.entries = kind(self.config.storage, key_states, value_states, most)
        none = torch.empty(*key_states.shape[:2], 0, device=self.device)
        self.scores, self.positions = none, none.to(torch.int32)
        if self.config.merge is not None:
            self.masses = none

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, J, T, D]`; returns all keys and values held.

        Raises:
            ValueError: more tokens than there is room for, outside `with locret(...)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, most = key_states.shape[2], self.config.ceiling + self.config.chunk
        if self.held + new > most and int(self.lane_counts().max()) + new > most:
            raise ValueError(
                f"{new} tokens do not fit beside the {self.held} held (budget + chunk = "
                f"{most}): call the model inside `with locret(model, heads, config)`, which reads "
                "long texts in chunks"
            )
        self.entries.append(key_states, value_states)
        self.held += new
        self.columns += new
        return self.all("key"), self.all("value")

    def all(self, name: str) -> Tensor:
        """Keys or values `[B, J, held, D]` in the model's dtype; name is "key" or "value"."""
        found = self.entries.read(name)
        if name == "value" or self.turns is None or self.turn is None:
            return found
        old = self.turns.shape[2]  # what came later stands where it was coded
        return torch.cat([self.turn(found[:, :, :old], self.turns), found[:, :, old:]], dim=2)

    def note(self, scores: Tensor, positions: Tensor, valid: Tensor | None) -> None:
        """What is known of the last T entries: scores `[B, J, T]`, positions and valid `[B, T]`."""
        b, j, before = self.scores.shape
        wide = (b, j, positions.shape[1])
        self.scores = torch.cat([self.scores, scores.expand(wide)], 2)
        self.positions = torch.cat([self.positions, positions[:, None].int().expand(wide)], 2)
        if self.masses is not None:
            self.masses = torch.cat([self.masses, self.masses.new_ones(wide)], 2)
        if valid is not None or self.valid is not None:
            old = self.valid
            if old is None:
                old = torch.ones(b, j, before, dtype=torch.bool, device=self.device)
            new = old.new_ones(b, positions.shape[1]) if valid is None else valid
            self.valid = torch.cat([old, new[:, None].expand(wide)], dim=2)
        most = self.held if self.valid is None else int(self.lane_counts().max())
        self.peak = max(self.peak, most)

    def tell(self, scores: Tensor, keep: bool) -> None:
        """Scores `[B, J, T]` of the last T entries; with `keep` they are also `foretold`."""
        new = scores.shape[2]
        self.scores[:, :, self.held - new :] = scores
        if keep:
            old = self.scores[:, :, :0] if self.foretold is None else self.foretold
            self.foretold = torch.cat([old, scores.to(old.dtype)], 2)

    def lane_counts(self) -> Tensor:
        """Entries of each row and head, int64 `[B, J]`."""
        if self.valid is None:
            return torch.full(self.scores.shape[:2], self.scores.shape[2], device=self.device)
        return self.valid.sum(-1)

    def counts(self) -> Tensor | int:
        """Entries of each row's fullest head: `[B, 1]`, or one number where all have as many."""
        if self.valid is None:
            return self.scores.shape[2]
        return self.valid.sum(-1).amax(-1, keepdim=True)

    def evict(
        self, last: Tensor | None, move: Turn | None = None, due: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Keep the budget's best.

        Args:
            last, due, limit: see `eviction.keep`.
            move: turns keys by so many positions: with it what stays is renumbered 0, 1, 2 …
        """
        if self.held <= self.config.budget and self.valid is None and limit is None:
            return
        self.evicted = True
        index, left = keep(
            self.scores, self.positions, self.valid, last, self.config, due, limit
        )  # fmt: skip
        if self.masses is not None:
            fused = merged(
                self.all("key"), self.all("value"), self.masses, index, left, self.valid,
                self.config.merge,
            )  # fmt: skip
        by = None if move is None else self._renumbered(index, left)
        old = None if self.turns is None else self._old_turns(index)
        self.entries.keep(index, left)
        if self.masses is not None:
            values, self.masses, changed = fused
            self.entries.write("value", values, changed)
        self.scores, self.positions = self.scores.gather(2, index), self.positions.gather(2, index)
        if self.foretold is not None:
            self.foretold = self.foretold.gather(2, index)
        self.held, self.valid = index.shape[2], left
        if move is None:
            return
        if self.config.storage == "model":
            self.entries.write("key", move(self.entries.read("key"), by))
        else:  # coded keys stay as they were coded, and are turned when they are read
            self.turn, self.turns = move, (by if old is None else old + by).int()
        self.state.pop("queries", None)  # they were turned for the old places

    def _renumbered(self, index: Tensor, left: Tensor | None) -> Tensor:
        """How far each entry that stays moves, int64 `[B, J, m]`.

        The newest entries of all heads stand at one place, so that the next token, which turns its
        query once for all heads, is as far from each of them.
        """
        places = torch.arange(index.shape[2], device=index.device)
        before = index
        if self.valid is not None:
            before = (self.valid.cumsum(2) - 1).gather(2, index) + _behind(self.valid)
        after = places.expand_as(index) if left is None else places + _behind(left)
        return after - before

    def _old_turns(self, index: Tensor) -> Tensor:
        more = self.positions.shape[2] - self.turns.shape[2]
        return torch.nn.functional.pad(self.turns, (0, more)).gather(2, index)

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
        return self.entries.nbytes if self.entries is not None else 0

    def note_bytes(self) -> int:
        """Bytes of what is noted of them: scores, positions, and what options add."""
        slots = getattr(self.entries, "slots", None)
        notes = (self.scores, self.positions, self.masses, self.foretold, self.turns, slots)
        return sum(x.nbytes for x in notes if x is not None)

    def fork(self) -> LayerStore:
        """A copy that can be appended to."""
        twin = copy.copy(self)  # notes are never written in place, but for scores
        twin.scores, twin.state = self.scores.clone(), dict(self.state)
        twin.entries = self.entries.fork() if self.entries is not None else None
        return twin


def _behind(valid: Tensor) -> Tensor:
    """Entries that each head has fewer than its row's fullest, `[B, J, 1]`."""
    counts = valid.sum(-1, keepdim=True)
    return counts.amax(1, keepdim=True) - counts

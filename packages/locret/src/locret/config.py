"""Sizes of Locret's bounded cache, with the paper's defaults (arXiv 2410.01805 §4, appendix)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Positions = Literal["contiguous", "original"]
Storage = Literal["model", "int8"]


@dataclass(frozen=True, kw_only=True)
class LocretConfig:
    """How much is kept, and what is never given up.

    Args:
        budget: entries kept for each key-value head between chunks, b.
        chunk: tokens prefilled at once, B; so no head ever holds more than budget + chunk.
        stabilisers: the newest entries of a chunk that survive the next eviction whatever their
            score, n_s: the heads judge a token badly before anything has followed it.
        sinks: the first tokens of the text, never evicted. The paper protects none.
        local: last tokens of a prompt that are read after the last eviction, n_loc; they take room
            beyond the budget, so at most a chunk.
        positions: "contiguous" renumbers what is kept 0, 1, 2 … as the paper does, so that a text
            may be longer than the model's positions; "original" leaves keys where they stood.
        storage: "model" keeps keys and values in the model's dtype, "int8" as 8-bit integers with
            a scale for each entry, read back at each call.

    Raises:
        ValueError: a size out of range, or a budget that the protected entries fill alone.
    """

    budget: int = 6000
    chunk: int = 3072
    stabilisers: int = 2500
    sinks: int = 0
    local: int = 100
    positions: Positions = "contiguous"
    storage: Storage = "model"

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to decide."""
        least = {"budget": 1, "chunk": 1, "stabilisers": 0, "sinks": 0, "local": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        if self.stabilisers + self.sinks > self.budget:
            raise ValueError(
                f"budget {self.budget} does not hold stabilisers {self.stabilisers} + sinks "
                f"{self.sinks}, which are always kept: raise budget or lower them"
            )
        if self.positions not in ("contiguous", "original"):
            raise ValueError(
                f'positions must be "contiguous" or "original", got {self.positions!r}'
            )

        if self.storage not in ("model", "int8"):
            raise ValueError(f'storage must be "model" or "int8", got {self.storage!r}')

    @property
    def tail(self) -> int:
        """Tokens of a prompt's end that are read without a further eviction."""
        return min(self.local, self.chunk)

    @property
    def capacity(self) -> int:
        """The most entries that any head may hold at any time."""
        return self.budget + self.chunk

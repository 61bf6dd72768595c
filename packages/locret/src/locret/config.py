"""Sizes of Locret's bounded cache, with the paper's defaults (arXiv 2410.01805 §4, appendix)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Positions = Literal["contiguous", "original"]
Storage = Literal["model", "int8", "int4"]
Budgets = Literal["uniform", "layer", "head"]


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
        storage: "model" keeps keys and values in the model's dtype; "int8" as 8-bit integers with
            a scale for each entry, "int4" as 4-bit integers with a scale and an offset for each 32
            numbers. They are coded once, and read back at each call.
        budgets: "uniform" gives every head `budget` entries; "head" lets the heads of a layer share
            heads · budget, "layer" the layers of the model layers · budget, by what their entries
            are worth. The sum is the same, and a head has between `floor` and `ceiling`.
        merge: an evicted entry leaves its value with the kept one whose key is most like its own,
            if their cosine is at least this, from −1 to 1; None: evicted values are lost.

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
    budgets: Budgets = "uniform"
    merge: float | None = None

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
        for name, known in (
            ("positions", Positions), ("storage", Storage), ("budgets", Budgets)
        ):  # fmt: skip
            if getattr(self, name) not in get_args(known):
                names = ", ".join(f'"{value}"' for value in get_args(known))
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        if self.merge is not None and not -1 <= self.merge <= 1:
            raise ValueError(f"merge is a cosine from −1 to 1, or None, got {self.merge}")

    @property
    def tail(self) -> int:
        """Tokens of a prompt's end that are read without a further eviction."""
        return min(self.local, self.chunk)

    @property
    def capacity(self) -> int:
        """The most entries that heads may hold at any time, in the mean over those that share."""
        return self.budget + self.chunk

    @property
    def floor(self) -> int:
        """The least that an eviction leaves any head that has as much."""
        if self.budgets == "uniform":
            return self.budget
        return max(1, self.budget // 2, self.stabilisers + self.sinks)

    @property
    def ceiling(self) -> int:
        """The most that an eviction leaves any head; it then may read a chunk."""
        return self.budget if self.budgets == "uniform" else 2 * self.budget

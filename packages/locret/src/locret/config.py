"""Sizes of Locret's bounded cache, with the paper's defaults (arXiv 2410.01805 §4, appendix)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LocretConfig:
    """How much is kept, and what is never given up.

    Args:
        budget: entries kept for each key-value head between chunks, b.
        chunk: tokens prefilled at once, B; so no head ever holds more than budget + chunk.
        stabilisers: the newest entries of a chunk that survive the next eviction whatever their
            score, n_s: the heads judge a token badly before anything has followed it.
        sinks: the first tokens of the text, never evicted. The paper protects none.

    Raises:
        ValueError: a size out of range, or a budget that the protected entries fill alone.
    """

    budget: int = 6000
    chunk: int = 3072
    stabilisers: int = 2500
    sinks: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to decide."""
        for name, least in (("budget", 1), ("chunk", 1), ("stabilisers", 0), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.stabilisers + self.sinks > self.budget:
            raise ValueError(
                f"budget {self.budget} does not hold stabilisers {self.stabilisers} + sinks "
                f"{self.sinks}, which are always kept: raise budget or lower them"
            )

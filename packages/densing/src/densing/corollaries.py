"""What follows from the law: cost halving, densing × Moore, and compression. §4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

DAYS_PER_YEAR = 365.25
DAYS_PER_MONTH = DAYS_PER_YEAR / 12


def combined_doubling(first_days: float, second_days: float) -> float:
    """Doubling time of the product of two growths: 1 / (1/T₁ + 1/T₂).

    Densing × Moore (§4): what fits on a chip of a given price grows with both.

    Raises:
        ValueError: a time that is not positive.
    """
    for value in (first_days, second_days):
        if not value > 0:
            raise ValueError(f"doubling times must be positive, got {value}")
    return 1 / (1 / first_days + 1 / second_days)


def halving_time(first: float, last: float, days: float) -> float:
    """Days in which a price halves, from two prices `days` apart; §4's cost of inference.

    Raises:
        ValueError: a price or span that is not positive, or prices that did not fall.
    """
    if not (first > last > 0 and days > 0):
        raise ValueError(f"expected first > last > 0 and days > 0, got {first}, {last}, {days}")
    return days / math.log2(first / last)


@dataclass(frozen=True)
class Compression:
    """A compressed model beside the one it was made from.

    Attributes:
        parent, child: names. before, after: their densities. `ratio`: after / before; above 1 the
            child is denser, which §4 finds to be the exception.
    """

    parent: str
    child: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Density of the child over its parent's."""
        return self.after / self.before


def compression(densities: Mapping[str, float], parents: Mapping[str, str]) -> list[Compression]:
    """Every child whose own and parent's density are known, densest first.

    Args:
        densities: model -> ρ. parents: child -> the model it was pruned or distilled from.
    """
    found = [
        Compression(parent, child, densities[parent], densities[child])
        for child, parent in parents.items()
        if child in densities and parent in densities
    ]
    return sorted(found, key=lambda c: -c.ratio)

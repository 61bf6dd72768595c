"""What a command hands to the command line, and how it writes numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a command prints, and the same as values."""

    text: str
    values: dict[str, Any]


def show_size(value: float | None) -> str:
    """Parameters with a unit: 7 B, 350 M."""
    if value is None:
        return "–"
    if math.isinf(value) or value > 1e18:
        return "∞"
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def show_plain(value: float | None) -> str:
    """Two digits, or ∞."""
    return "∞" if value is None or math.isinf(value) else f"{value:.2g}"


def finite(value: float | None) -> float | None:
    """JSON has no infinity: None stands for it."""
    return value if value is not None and math.isfinite(value) else None

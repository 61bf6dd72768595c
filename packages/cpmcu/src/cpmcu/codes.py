"""A quantised matrix, plainly: integer codes, and one float16 scale for a group of columns.

Letters: O rows, I columns, g columns of a group. weight[o, i] = codes[o, i] * scales[o, i // g],
codes in -8 … 7 (4 bits) or -128 … 127 (8 bits): the CPU kernels' numbers, and those of GGUF's Q4_0
and Q8_0 where g is 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from cpmcu._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BITS = {"int4": 4, "int8": 8}
GROUPS = (32, 64, 128)
RANGES = {4: (-8, 7), 8: (-128, 127)}
_SLAB = 4096  # groups of a search: what it makes of them stays in a cache


@cache
def _fractions(bits: int) -> list[float]:
    """Of the scale that covers the largest weight.

    In 4 bits clipping it a little can cost less than coarser steps for all the others. In 8 bits
    nothing is clipped: what counts is that the steps fall on the weights, those of a model that
    was rounded before above all.
    """
    low, high, count = (0.6, 1.1, 26) if bits == 4 else (0.99, 1.3, 64)
    return torch.linspace(low, high, count).tolist()


@dataclass(slots=True)
class Codes:
    """A matrix of integers with scales.

    Attributes:
        codes: int8 [O, I].
        scales: float16 [O, I / group]; may be negative.
        bits: 4 or 8.
        dtype: what the model's floats have beside it; None: float32.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """ValueError where the parts do not fit each other."""
        self.dtype = self.dtype or torch.float32
        O, I = self.codes.shape
        if self.bits not in RANGES:
            raise ValueError(f"bits must be one of {tuple(RANGES)}, got {self.bits}")
        groups = self.scales.shape[1] if self.scales.dim() == 2 else 0
        if self.scales.shape != (O, groups) or not groups or I % groups or self.group not in GROUPS:
            raise ValueError(
                f"codes {tuple(self.codes.shape)} need scales [{O}, {I} / g], g in {GROUPS}; "
                f"got {tuple(self.scales.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def quant(self) -> str:
        """ "int4" or "int8"."""
        return f"int{self.bits}"

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights, [O, I]; exact in float32, the default."""
        values = self.codes.float().unflatten(1, (-1, self.group)) * self.scales.float()[..., None]
        return values.flatten(1).to(dtype or torch.float32)

    def rows(self, index: Tensor) -> Codes:
        """The same matrix with its rows in another order."""
        return Codes(self.codes[index], self.scales[index], self.bits, self.dtype)

    def regrouped(self, group: int) -> Codes:
        """The same weights with smaller groups: scales repeated."""
        if self.group % group:
            raise ValueError(f"groups of {self.group} cannot be split into groups of {group}")
        scales = self.scales.repeat_interleave(self.group // group, 1)
        return Codes(self.codes, scales, self.bits, self.dtype)


def stack(parts: Sequence[Codes]) -> Codes:
    """Matrices of equal columns, bits and groups, one below the other."""
    first = parts[0]
    if any((p.bits, p.group, p.shape[1]) != (first.bits, first.group, first.shape[1])
           for p in parts):  # fmt: skip
        kinds = [(p.bits, p.group, p.shape) for p in parts]
        raise ValueError(f"matrices that are read together must be of one kind, got {kinds}")
    codes = torch.cat([p.codes for p in parts])
    return Codes(codes, torch.cat([p.scales for p in parts]), first.bits, first.dtype)


def scales_for(
    groups: Tensor, bits: int, *, search: bool = False, importance: Tensor | None = None
) -> Tensor:
    """One scale for each group of weights.

    The largest magnitude gets the code -8 of 4 bits, or 127 of 8. With `search`, the fraction of
    that scale (of either sign, in 4 bits) with the least squared error is taken.

    Args:
        groups: float [..., g].
        bits: 4 or 8.
        search: as above.
        importance: weight of each column's squared error, float [g]; None: 1.

    Returns:
        float16 [...].
    """
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    full = -extreme / 8 if bits == 4 else extreme.abs() / 127
    best = full.half()
    if search:
        flat, best = groups.flatten(0, -2), best.clone()
        for part, wide, found in zip(
            flat.split(_SLAB), full.flatten().split(_SLAB), best.view(-1).split(_SLAB), strict=True
        ):
            found.copy_(_searched(part, wide, bits, importance))
    if not bool(best.isfinite().all()):
        raise ValueError("weights above 65504 * 8, or not finite, have no float16 scale")
    return best


def _searched(groups: Tensor, full: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Of the tried fractions of `full` [n] the scale float16 [n] that loses least of [n, g]."""
    least = torch.full_like(full, torch.inf)
    chosen = full.half()
    for sign in (1, -1) if bits == 4 else (1,):
        for fraction in _fractions(bits):
            scale = (full * sign * fraction).half()
            error = (groups - held(groups, scale, bits)).square()
            error = (error if importance is None else error * importance).sum(-1)
            better = error < least
            least, chosen = least.where(~better, error), chosen.where(~better, scale)
    return chosen


def nearest_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight as a float; `scale` float16, broadcast over the last axis."""
    wide = scale.to(weight.dtype)[..., None]
    low, high = RANGES[bits]
    return torch.where(wide == 0, 0.0, weight * (1 / wide)).round().clamp(low, high)


def held(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What remains of weights [..., g] with scales [...]."""
    return nearest_codes(groups, scale, bits) * scale.to(groups.dtype)[..., None]


def nearest(weight: Tensor, bits: int, group: int = 32, *, search: bool = False) -> Codes:
    """Round to nearest ("rtn").

    Args:
        weight: float [O, I], I a multiple of `group`.
        bits: 4 or 8.
        group: columns to a scale.
        search: choose scales by the least squared error instead of the largest weight.

    Raises:
        ValueError: the columns are no whole groups, or the weights not finite.
    """
    check(weight.shape[1], bits, group)
    groups = weight.float().unflatten(1, (-1, group))
    scales = scales_for(groups, bits, search=search)
    codes = nearest_codes(groups, scales, bits).flatten(1).to(torch.int8)
    return Codes(codes, scales, bits, weight.dtype)


def check(columns: int, bits: int, group: int) -> None:
    """ValueError unless matrices of `columns` can have `bits` and `group`."""
    if bits not in RANGES:
        raise ValueError(f"bits must be one of {tuple(RANGES)}, got {bits}")
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group}")
    if columns % group:
        fitting = [g for g in GROUPS if columns % g == 0]
        raise ValueError(
            f"groups of {group} columns do not divide {columns} columns: "
            + (f"take one of {fitting}" if fitting else "this matrix cannot be quantised")
        )

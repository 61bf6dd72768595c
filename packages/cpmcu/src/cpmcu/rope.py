"""Rotary position embedding: the frequencies of every published scaling, and cached tables.

RoFormer (arXiv:2104.09864) for the rotation, LongRoPE (arXiv:2402.13753) for per-dimension
factors, position interpolation (arXiv:2306.15595) for "linear", Llama 3.1 for "llama3".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import dtypes

if TYPE_CHECKING:
    import torch

KINDS = ("default", "linear", "llama3", "longrope")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """How positions become angles. Lists of factors have head_dim / 2 entries.

    `original_context` is the trained length in tokens: "longrope" takes `long_factor` for a
    sequence that is longer and `short_factor` otherwise; "llama3" blends around it.
    `attention_factor` multiplies cosines and sines.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens takes other angles than a short one."""
        differs = self.kind == "longrope" and self.long_factor != self.short_factor
        return differs and length > self.original_context

    def frequencies(self, head_dim: int, *, long: bool = False) -> np.ndarray:
        """Angle per position of each pair of dimensions, float32 [head_dim / 2]."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # The power in double, so that rounding it is all that is lost.
        power = (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / power
        if self.kind == "linear":
            return frequency / np.float32(self.factor)
        if self.kind == "longrope":
            factors = self.long_factor if long else self.short_factor
            return frequency / np.array(factors, np.float32)
        if self.kind == "llama3":
            return self._llama3(frequency)
        return frequency

    def _llama3(self, frequency: np.ndarray) -> np.ndarray:
        # Turns of each pair within the trained context: many turns are local detail and stay,
        # few turns are position and are interpolated, between the two a linear blend.
        turns = self.original_context * frequency / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clip(0.0, 1.0)
        return (frequency * (keep + (1.0 - keep) / self.factor)).astype(np.float32)


class RopeTable:
    """Cosines and signed sines of positions 0..capacity-1, grown by doubling: float32 arrays, or
    with a `dtype` of PyTorch tensors of that, on `device`.

    The sine's first half is negated, so that the half-rotation becomes
    `x * cos + x.roll(head_dim // 2, -1) * sin`: no concatenation, no negation per token.
    """

    def __init__(
        self,
        rope: Rope,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._rope, self._head_dim, self._dtype, self._device = rope, head_dim, dtype, device
        self._tables: dict[bool, tuple[Any, Any]] = {}

    def rows(self, start: int, end: int, *, length: int) -> tuple[Any, Any]:
        """Cosine and sine [end - start, 1, head_dim] of a call that ends at `length` tokens."""
        long = self._rope.is_long(length)
        cos, sin = self._tables.get(long, (np.empty(0), np.empty(0)))
        if cos.shape[0] < end:
            cos, sin = self._tables[long] = self._build(max(256, 1 << (end - 1).bit_length()), long)
        return cos[start:end], sin[start:end]

    def _build(self, capacity: int, long: bool) -> tuple[Any, ...]:
        # Angles in fp32 whatever the model's dtype: bf16 has 8 bits, positions need 15 and more.
        angle = np.outer(
            np.arange(capacity, dtype=np.float32),
            self._rope.frequencies(self._head_dim, long=long),
        )
        factor = np.float32(self._rope.attention_factor)
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        tables = np.concatenate((cos, cos), -1), np.concatenate((-sin, sin), -1)
        tables = tuple(table[:, None] for table in tables)
        if self._dtype is None:
            return tables
        return tuple(
            dtypes.to_torch(table, "float32").to(self._device, self._dtype) for table in tables
        )

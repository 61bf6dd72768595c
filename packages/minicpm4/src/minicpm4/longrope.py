"""LongRoPE: rotary positions with one divisor for each frequency. arXiv 2402.13753.

The i-th of the D/2 frequencies of a head is θ^(-2i/D) / factor_i. There are two lists of factors:
`short_factor` while all positions lie within `original_max_position_embeddings`, `long_factor`
beyond. MiniCPM4 publishes equal lists; models extended later need not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from minicpm4.configuration import MiniCPM4Config


def inverse_frequencies(theta: float, head_dim: int, factors: list[float] | None = None) -> Tensor:
    """Angular frequencies of RoPE, fp32 `[head_dim / 2]`, each divided by its factor if given.

    Raises:
        ValueError: not one factor for each frequency.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if factors is None:
        return 1.0 / theta**exponent
    if len(factors) != head_dim // 2:
        raise ValueError(
            f"LongRoPE needs {head_dim // 2} factors for head_dim {head_dim}, got {len(factors)}"
        )
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * theta**exponent)


def attention_factor(max_positions: int, original_max_positions: int) -> float:
    """Factor on cos and sin that makes up for the longer context: √(1 + ln(L/L₀) / ln L₀)."""
    scale = max_positions / original_max_positions
    if scale <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(original_max_positions))


class RotaryEmbedding(nn.Module):
    """cos and sin of the positions' angles, computed in fp32.

    A sequence that grows past the original length switches to the long factors from that step on;
    the keys cached before keep the short ones, as in the published model. Where the two lists
    differ, re-reading the prompt gives the exact long-context result.
    """

    def __init__(self, config: MiniCPM4Config) -> None:
        super().__init__()
        rope = config.rope_parameters or {}
        self.theta = rope.get("rope_theta", 10000.0)
        self.head_dim = config.head_dim
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "longrope"):
            raise ValueError(f"rope_parameters.rope_type must be default or longrope, got {kind!r}")
        self.short: list[float] | None = None
        self.long: list[float] | None = None
        self.original_max = config.max_position_embeddings
        self.scaling = 1.0
        if kind == "longrope":
            self.short, self.long = rope["short_factor"], rope["long_factor"]
            self.original_max = rope["original_max_position_embeddings"]
            given = rope.get("attention_factor")
            self.scaling = (
                given
                if given is not None
                else attention_factor(config.max_position_embeddings, self.original_max)
            )
        self.switches = self.short != self.long
        # Derived from the configuration alone, so not part of a checkpoint.
        self.register_buffer("short_freq", torch.empty(0), persistent=False)
        self.register_buffer("long_freq", torch.empty(0), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the frequencies (again, where weights were created on the meta device)."""
        self.short_freq = inverse_frequencies(self.theta, self.head_dim, self.short)
        self.long_freq = inverse_frequencies(self.theta, self.head_dim, self.long)

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, T, head_dim]` in `dtype` for integer positions `[B, T]`."""
        beyond = self.switches and positions.numel() and int(positions.max()) >= self.original_max
        frequencies = (self.long_freq if beyond else self.short_freq).to(positions.device)
        angles = positions[..., None].float() * frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to `x` `[B, H, T, D]`, pairing dimension i with i + D/2; cos, sin `[B, T, D]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

"""Keys and values as 8-bit integers with one scale for each entry: half the memory of bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x's shape and float32 scales `[..., 1]`: x ≈ codes · scales.

    The largest number of an entry becomes ±127, so what comes back from `dequantise` is coded the
    same again: renumbering that turns an entry by nothing does not wear it.
    """
    scales = x.float().abs().amax(-1, keepdim=True) / 127
    codes = (x.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return codes.to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` coded, within half a scale."""
    return (codes.float() * scales).to(dtype)

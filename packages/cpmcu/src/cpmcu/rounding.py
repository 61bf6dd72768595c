"""Round-to-nearest quantisation of weights, plainly: what the integer layouts hold."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # columns of a row that share a scale


def rounded(weight: Tensor, quant: str) -> Tensor:
    """The numbers that remain of `weight` in 8 or 4 bits, 32 columns to a float16 scale.

    int8 is symmetric: codes −127 … 127 times max|w| / 127. int4 has codes −8 … 7, and the weight of
    the largest magnitude gets the −8 (as in GGUF's Q4_0), so a scale may be negative.

    Args:
        weight: `[rows, cols]`, cols a multiple of 32.
        quant: "int8", "int4"; others return the weight as float32.

    Returns:
        float32 `[rows, cols]`.
    """
    x = weight.float()
    if quant not in ("int8", "int4"):
        return x
    groups = x.unflatten(1, (-1, GROUP))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    wanted = extreme.abs() / 127 if quant == "int8" else -extreme / 8
    scale = wanted.half().float()
    low, high = (-128, 127) if quant == "int8" else (-8, 7)
    codes = torch.where(scale == 0, 0.0, (groups * (1 / scale))).round().clamp(low, high)
    return (codes * scale).flatten(1)

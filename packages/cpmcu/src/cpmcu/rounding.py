"""Round-to-nearest quantisation of weights, plainly: what the integer layouts hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpmcu.codes import BITS, nearest

if TYPE_CHECKING:
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
    if quant not in BITS:
        return weight.float()
    return nearest(weight, BITS[quant], GROUP).dequantise()

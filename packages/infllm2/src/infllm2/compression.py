"""Compressed keys: means of keys over overlapping kernels, fine and coarse (arXiv 2509.24663, 3.1).

A compressed key is kept in the keys' own dtype, rounded once from a float32 mean, as a cache stores
it. Sums run in a fixed order, so keys compressed as they arrive equal keys compressed at once, bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infllm2.config import COARSE_FACTOR, InfLLMv2Config


@dataclass(frozen=True)
class CompressedKeys:
    """All complete kernels of `length` keys.

    Attributes:
        fine: `[B, Hkv, max(0, (length − l) // s + 1), D]` with l = kernel_size, s = kernel_stride.
        coarse: the same with l and s four times as large.
        length: number of keys they were made of.
    """

    fine: Tensor
    coarse: Tensor
    length: int


def kernel_count(length: int, size: int, stride: int) -> int:
    """Kernels of `size` keys, one each `stride`, that are complete within `length` keys."""
    return max(0, (length - size) // stride + 1)


def compress(k: Tensor, size: int, stride: int) -> Tensor:
    """out[j] = mean(k[j·stride : j·stride + size]) of complete kernels, in k's dtype.

    Args:
        k: `[..., S, D]`.
        size: a multiple of `stride`.
        stride: tokens between two kernels.

    Returns:
        `[..., kernel_count(S, size, stride), D]`.
    """
    return _windows(_steps(k, stride), size // stride, size, k)


def compress_keys(k: Tensor, config: InfLLMv2Config) -> tuple[Tensor, Tensor]:
    """Fine and coarse kernels of k `[B, Hkv, S, D]`: `compress` twice, reading the keys once."""
    size, stride = config.kernel_size, config.kernel_stride
    sums = _steps(k, stride)
    width = size // stride
    fine = _windows(sums, width, size, k)
    whole = sums.shape[-2] // COARSE_FACTOR * COARSE_FACTOR
    quarters = sums[..., :whole, :].unflatten(-2, (whole // COARSE_FACTOR, COARSE_FACTOR))
    return fine, _windows(_in_order(quarters), width, COARSE_FACTOR * size, k)


def _steps(k: Tensor, stride: int) -> Tensor:
    """Sums over consecutive strides, in float32 (float64 stays): `[..., S // stride, D]`."""
    steps = k.shape[-2] // stride
    return _in_order(k[..., : steps * stride, :].unflatten(-2, (steps, stride)))


def _in_order(x: Tensor) -> Tensor:
    """Sum over the last axis but one, first to last: unlike `sum`, whatever the tensor's shape."""
    total = x[..., 0, :].to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
    for i in range(1, x.shape[-2]):
        total += x[..., i, :]
    return total


def _windows(sums: Tensor, width: int, size: int, k: Tensor) -> Tensor:
    """Means over `width` neighbouring sums of `size` keys in all, in k's dtype."""
    count = max(0, sums.shape[-2] - width + 1)
    total = sums[..., :count, :].clone()
    for i in range(1, width):
        total += sums[..., i : i + count, :]
    return total.div_(size).to(k.dtype)

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
    return _means(k, size, stride, 1)


def compress_keys(k: Tensor, config: InfLLMv2Config) -> tuple[Tensor, Tensor]:
    """All complete fine and coarse kernels of k `[B, Hkv, S, D]`: `compress` at both levels."""
    counts = kernel_counts(k.shape[2], config)
    fine, coarse = (k.new_empty(*k.shape[:2], n, k.shape[3]) for n in counts)
    write_kernels(k, config, fine, coarse, (0, 0))
    return fine, coarse


def kernel_counts(length: int, config: InfLLMv2Config) -> tuple[int, int]:
    """Complete fine and coarse kernels of `length` keys."""
    size, stride = config.kernel_size, config.kernel_stride
    return (
        kernel_count(length, size, stride),
        kernel_count(length, COARSE_FACTOR * size, COARSE_FACTOR * stride),
    )


def write_kernels(
    k: Tensor, config: InfLLMv2Config, fine: Tensor, coarse: Tensor, had: tuple[int, int]
) -> None:
    """Write the kernels of k that are not there yet, in C++ where it can, to the same bits.

    Args:
        k: `[B, Hkv, S, D]`.
        config: sizes of the kernels.
        fine: `[B, Hkv, at least all fine kernels of k, D]`, in k's dtype.
        coarse: the same for coarse ones.
        had: how many fine and coarse ones are there.
    """
    from infllm2.backends import cpu_backend, cpu_library

    counts = kernel_counts(k.shape[2], config)
    native = k.device.type == "cpu" and k.dtype in cpu_library.DTYPES
    # Inside of a `torch.func` transform tensors have no address.
    native = native and not torch._C._functorch.peek_interpreter_stack()
    if native and k.stride(-1) == 1 and cpu_library.kernels()[0] is not None:
        ranges = tuple(zip(had, counts, strict=True))
        return cpu_backend.compress(k.detach(), config, fine, coarse, *ranges)
    size, stride = config.kernel_size, config.kernel_stride
    for out, first, end, factor in zip(
        (fine, coarse), had, counts, (1, COARSE_FACTOR), strict=True
    ):
        if end > first:
            tail = k[:, :, first * factor * stride :]
            out[:, :, first:end] = _means(tail, size, stride, factor)


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


def _means(k: Tensor, size: int, stride: int, factor: int) -> Tensor:
    """Kernels of `factor · size` keys, one each `factor · stride`."""
    sums = _steps(k, stride)
    steps = sums.shape[-2] // factor
    sums = _in_order(sums[..., : steps * factor, :].unflatten(-2, (steps, factor)))
    return _windows(sums, size // stride, factor * size, k)


def _windows(sums: Tensor, width: int, size: int, k: Tensor) -> Tensor:
    """Means over `width` neighbouring sums of `size` keys in all, in k's dtype."""
    count = max(0, sums.shape[-2] - width + 1)
    total = sums[..., :count, :].clone()
    for i in range(1, width):
        total += sums[..., i : i + count, :]
    return total.div_(size).to(k.dtype)

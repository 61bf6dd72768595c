"""How fast packed products are on this machine: what `bitcpm bench` prints.

A quick look at one shape on random weights. The comparison with ggml and PyTorch's integer product
is `benchmarks/bitcpm.py` in the repository.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import groups_of
from .cpu_library import MODES
from .matrix import TernaryMatrix, large_bytes
from .packing import CODECS, PackedTensor, pack_codes


@dataclass(frozen=True, slots=True)
class Timing:
    """One way to multiply, for all copies of the matrix together.

    Attributes:
        way: "1.6bit int8", for instance, or "torch bfloat16".
        tokens: T of the product.
        seconds: median.
        bits: a weight takes, scales included.
        weights: multiplied by each token.
        bytes: read.
    """

    way: str
    tokens: int
    seconds: float
    bits: float
    weights: int
    bytes: int


def read_bandwidth() -> float:
    """Bytes a second that PyTorch's sum reads from memory, on its threads."""
    data = large_bytes(256 << 20).zero_().view(torch.float32)
    return data.nbytes / min(_seconds(data.sum) for _ in range(7))


def bench(
    out_features: int,
    in_features: int,
    *,
    group_size: int = 128,
    tokens: int = 1,
    bytes_of_weights: int = 64 << 20,
    repeats: int = 7,
) -> Iterator[Timing]:
    """Time every codec and mode, and PyTorch's bfloat16 product, in turn.

    Args:
        out_features: O, >= 1.
        in_features: I, >= 1.
        group_size: >= 1, or -1 for whole rows.
        tokens: T, >= 1.
        bytes_of_weights: packed size of all matrices together, in the smallest codec; more than the
            last cache for weights that come from memory, less than that for weights in cache.
        repeats: calls of each way, >= 1.

    Raises:
        ImportError: the kernels were not built.
        ValueError: a number is out of range.
    """
    sizes = {"out": out_features, "in": in_features, "tokens": tokens, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    _, full, tail = groups_of(in_features, group_size)
    generator = torch.Generator().manual_seed(0)
    shape = (out_features, in_features)
    codes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(out_features, full + bool(tail), generator=generator).bfloat16()
    x = torch.randn(tokens, in_features, generator=generator)
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    copies = 0
    for codec in sorted(CODECS):
        packed = PackedTensor(pack_codes(codes, codec), scales, shape, group_size, codec)
        first = TernaryMatrix.from_packed(packed)
        copies = copies or max(1, bytes_of_weights // first.nbytes)
        matrices = [first, *(first.copy() for _ in range(copies - 1))]
        for mode in MODES:
            call = functools.partial(_all, matrices, x, mode)
            ways[f"{codec} {mode}"] = call, copies * first.nbytes
    dense, half = packed.dequantise(torch.bfloat16), x.bfloat16()
    # As many bytes as the packed matrices have would be one copy: it is read several times.
    several = [dense.clone() for _ in range(max(1, min(copies, (128 << 20) // dense.nbytes)))]
    ways["torch bfloat16"] = functools.partial(_dense, several, half, copies), copies * dense.nbytes
    times: dict[str, list[float]] = {way: [] for way in ways}
    for call, _ in ways.values():
        call()
    for _ in range(repeats):
        for way, (call, _) in ways.items():
            times[way].append(_seconds(call))
    weights = copies * out_features * in_features
    for way, (_, size) in ways.items():
        seconds = statistics.median(times[way])
        yield Timing(way, tokens, seconds, 8 * size / weights, weights, size)


def _all(matrices: list[TernaryMatrix], x: Tensor, mode: str) -> None:
    for matrix in matrices:
        matrix.multiply(x, None, mode)


def _dense(matrices: list[Tensor], x: Tensor, count: int) -> None:
    for i in range(count):
        torch.nn.functional.linear(x, matrices[i % len(matrices)])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

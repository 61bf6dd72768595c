from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infllm2 import InfLLMv2Config
from testbed import triton_without_gpu

# The checks of the Triton kernels lie beside this file; the interpreter's process imports them too.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the CPU kernels are skipped where they were not built."""
    from infllm2.backends.cpu_library import kernels

    library, reason = kernels()
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if library is None and backend == "cpu":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Runs a check of the Triton kernels in the process that has Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    with triton_without_gpu.interpreter() as run:
        yield run


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a check of the Triton kernels: in the interpreter, and compiled if there is a GPU."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return lambda check, *args: check("cuda", *args)


@pytest.fixture
def small() -> InfLLMv2Config:
    """Few tokens per block, so that short sequences have a choice to make."""
    return InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1
    )


@pytest.fixture
def randn() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Random (q, k, v): B rows, K key-value heads, G heads per group, T queries of S positions."""

    def make(
        S: int, T: int | None = None, B: int = 1, K: int = 2, G: int = 3, D: int = 16, dtype=None
    ) -> tuple[Tensor, Tensor, Tensor]:
        T = S if T is None else T
        shapes = ((B, K * G, T, D), (B, K, S, D), (B, K, S, D))
        return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)

    return make


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _kernel_logits(q: list[float], keys: list[list[float]], t: int, size: int, stride: int):
    """(start, logit) of every kernel that lies at or before t."""
    found, start = [], 0
    while start + size - 1 <= t:
        members = keys[start : start + size]
        mean = [sum(column) / size for column in zip(*members, strict=True)]
        found.append((start, _dot(q, mean) / math.sqrt(len(q))))
        start += stride
    return found


def brute_force_blocks(q: Tensor, k: Tensor, config: InfLLMv2Config) -> Tensor:
    """The paper's selection in Python loops over one query at a time: [B, K, T, budget], −1 padded.

    Written from the definition in the documentation, sharing no code with the package.
    """
    B, H, T, _ = q.shape
    K, S = k.shape[1], k.shape[2]
    out = torch.full((B, K, T, config.budget), -1, dtype=torch.int32)
    for b in range(B):
        for g in range(K):
            keys = k[b, g].tolist()
            group = range(g * (H // K), (g + 1) * (H // K))
            for i in range(T):
                queries = [q[b, h, i].tolist() for h in group]
                chosen = sorted(_choose(queries, keys, S - T + i, config))
                out[b, g, i, : len(chosen)] = torch.tensor(chosen)
    return out


def _choose(
    queries: list[list[float]], keys: list[list[float]], t: int, config: InfLLMv2Config
) -> set[int]:
    """Blocks of the token at t, whose group has these queries."""
    size, stride, block = config.kernel_size, config.kernel_stride, config.block_size
    own = t // block
    kernels: dict[int, float] = {}
    for query in queries:
        fine = _kernel_logits(query, keys, t, size, stride)
        terms = fine
        if config.lse == "approx":
            terms = _kernel_logits(query, keys, t, 4 * size, 4 * stride) or fine
        if not terms:
            continue
        total = sum(math.exp(x) for _, x in terms)
        for start, x in fine:
            kernels[start] = kernels.get(start, 0.0) + math.exp(x) / total
    scores = {
        m: max(
            (
                s
                for start, s in kernels.items()
                if start < (m + 1) * block and start + size > m * block
            ),
            default=0.0,
        )
        for m in range(own + 1)
    }
    forced = set(range(min(config.init_blocks, own + 1)))
    forced |= set(range(max(0, own + 1 - config.window_size // block), own + 1))
    others = sorted(set(scores) - forced, key=lambda m: (-scores[m], m))
    room = config.topk + config.window_size // block - len(forced)
    return forced | set(others[:room])


@pytest.fixture(scope="session")
def oracle() -> Callable[[Tensor, Tensor, InfLLMv2Config], Tensor]:
    """The brute-force selection."""
    return brute_force_blocks

"""How fast sparse and dense attention are on this machine: what `infllm2 bench` prints.

A quick look at one shape and length on random tensors; the comparison with every way a user has is
`benchmarks/infllm2.py` in the repository.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infllm2.attention import attend, dense_attention
from infllm2.config import InfLLMv2Config
from infllm2.selection import blocks_of, compressed
from infllm2.trace import timed


@dataclass(frozen=True)
class Timing:
    """One kind of call, in seconds (medians of calls that take turns).

    Attributes:
        kind: "decode" or "prefill".
        queries: tokens of the call, the last ones of the sequence.
        selection: choosing blocks.
        sparse: selection and attention.
        dense: attention to all keys by the same backend (PyTorch's where it has none of its own).
        torch: by PyTorch's fused kernel.
    """

    kind: str
    queries: int
    selection: float
    sparse: float
    dense: float
    torch: float


def bench(
    tokens: int, heads: int, kv_heads: int, head_dim: int, config: InfLLMv2Config,
    *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", piece: int = 256,
    backend: str = "auto", repeats: int = 7,
) -> Iterator[Timing]:  # fmt: skip
    """Time one decoded token, and the last `piece` tokens of a prompt.

    Compressed keys exist already, as a cache keeps them.

    Args:
        tokens: keys; at least 1.
        heads: query heads, a multiple of `kv_heads`.
        kv_heads: key-value heads.
        head_dim: size of one head.
        config: sizes and budget; its `dense_len` is not used.
        dtype: of queries, keys and values.
        device: where they live.
        piece: tokens of the prefill call.
        backend: "auto", or one of `infllm2.backends.ORDER`.
        repeats: calls of each kind; at least 1.

    Raises:
        ValueError: a number is out of range, or the backend cannot run such inputs.
    """
    sizes = {
        "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "piece": piece, "repeats": repeats,
    }  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    generator = torch.Generator(device).manual_seed(0)

    def random(count: int, length: int) -> Tensor:
        shape = (1, count, length, head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    k, v = random(kv_heads, tokens), random(kv_heads, tokens)
    sparse = dataclasses.replace(config, dense_len=-1)
    dense = dataclasses.replace(config, dense_len=tokens + 1)
    known = compressed(k, config)
    for kind, queries in (("decode", 1), ("prefill", min(piece, tokens))):
        q = random(heads, queries)
        call = functools.partial(attend, q, k, v, keys=lambda: known, backend=backend)
        ways: dict[str, Callable[[], object]] = {
            "selection": functools.partial(blocks_of, q, k, sparse, keys=known, backend=backend),
            "sparse": functools.partial(call, sparse),
            "dense": functools.partial(call, dense),
            "torch": functools.partial(dense_attention, q, k, v),
        }
        with torch.no_grad():
            times = {name: [timed(way, q.device)[1]] for name, way in ways.items()}  # warm
            for _ in range(repeats):
                for name, way in ways.items():
                    times[name].append(timed(way, q.device)[1])
        yield Timing(kind, queries, **{n: statistics.median(t[1:]) for n, t in times.items()})

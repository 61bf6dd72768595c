"""From how many keys on sparse attention pays on this machine, measured (`dense_len="auto"`).

Below `budget · block_size` keys both give the same, so there is nothing to gain. Beyond, sparse
attention wins late where a kernel costs more for scattered blocks than for all of them, which
depends on the heads' shape, the dtype and the processor. So it is timed, once a process for each
shape, on random tensors: their queries agree on nothing, which is the worst case for sparse
attention, and the switch errs towards dense attention, the exact side.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from infllm2.config import InfLLMv2Config
from infllm2.selection import compressed
from infllm2.trace import timed

logger = logging.getLogger("infllm2")

# Lengths tried, as multiples of `budget · block_size`.
LADDER = (1.0, 1.125, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)
# Queries of a piece of a prompt that is timed.
PIECE = 128
# Sparse attention must be at least so much faster, for a timing is not exact.
MARGIN = 1.02
REPEATS = 5


def dense_below(config: InfLLMv2Config, q: Tensor, k: Tensor, backend: str) -> int:
    """Fewer keys than this run dense: `config.dense_len`, or what was measured for "auto".

    Args:
        config: sizes and budget.
        q: `[B, Hq, T, D]`; only its kind counts.
        k: `[B, Hkv, S, D]`, in the same way.
        backend: name, or "auto".
    """
    if config.dense_len != "auto":
        return config.dense_len
    least = config.budget * config.block_size
    if k.shape[2] < least:  # decided without a measurement
        return least
    return _measured(config, q.shape[1], k.shape[1], q.shape[3], q.dtype, q.device, backend,
                     torch.get_num_threads())  # fmt: skip


@functools.lru_cache(256)
@torch.no_grad()
def _measured(
    config: InfLLMv2Config, heads: int, kv_heads: int, dim: int, dtype: torch.dtype,
    device: torch.device, backend: str, threads: int,
) -> int:  # fmt: skip
    """The least length of the ladder from which sparse attention is never behind."""
    from infllm2.attention import attend  # it imports this module

    unit = config.budget * config.block_size
    # Selection before rotary embedding costs the same, and the released frontier is not timed.
    sparse = dataclasses.replace(config, dense_len=-1, use_nope=False, compat=None)
    dense = dataclasses.replace(sparse, dense_len=int(LADDER[-1] * unit) + 1)
    generator = torch.Generator(device).manual_seed(0)
    start = time.perf_counter()
    longest = int(LADDER[-1] * unit)
    piece = min(PIECE, unit)
    q = torch.randn(1, heads, piece, dim, generator=generator, device=device).to(dtype)
    k, v = (
        torch.randn(1, kv_heads, longest, dim, generator=generator, device=device).to(dtype)
        for _ in range(2)
    )
    found = longest
    prompt = {"dense": 0.0, "sparse": 0.0}  # seconds for the tokens from the first length on
    before, each = unit, {"dense": 0.0, "sparse": 0.0}
    for step in LADDER:
        length = int(step * unit)
        # As a cache has them: in decoding nobody compresses all keys again.
        known = compressed(k[:, :, :length], config)
        ratios = []
        for queries in (1, piece):
            seconds = {
                name: _seconds(
                    lambda c=c, n=queries, s=length, known=known: attend(
                        q[:, :, -n:],
                        k[:, :, :s],
                        v[:, :, :s],
                        c,
                        keys=lambda: known,
                        backend=backend,
                    ),
                    device,
                )
                for name, c in (("dense", dense), ("sparse", sparse))
            }
            if queries == 1:
                ratios.append(seconds["dense"] / seconds["sparse"])
                continue
            for name, value in seconds.items():
                prompt[name] += (each[name] + value) / 2 / piece * (length - before)
            # A whole prompt: all tokens up to `unit`, which cost the same either way, and then.
            head = seconds["dense"] / piece * unit * unit / length / 2
            ratios.append((head + prompt["dense"]) / (head + prompt["sparse"]))
            each, before = seconds, length
        if min(ratios) >= MARGIN:
            found = length
            break
    logger.info(
        'dense_len="auto": %d keys for %d/%d heads of %d, %s on %s, %d threads (%.1f s)',
        found, heads, kv_heads, dim, dtype, device, threads, time.perf_counter() - start,
    )  # fmt: skip
    return found


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The least of some repetitions: what is asked is what the kernels can do, not the noise."""
    return min(timed(function, device)[1] for _ in range(REPEATS))

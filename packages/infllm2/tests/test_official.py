"""`compat="official"` against the released kernels' formulas, written down again in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from infllm2 import InfLLMv2Config, select_blocks
from infllm2.compression import compress_keys
from infllm2.official import visible_kernels

CONFIG = InfLLMv2Config(window_size=128, topk=4, dense_len=-1, compat="official")


def by_hand(q: torch.Tensor, k: torch.Tensor, i: int, T: int) -> set[int]:
    """Blocks of query i of T for the one key-value head of k [S, D], kernels 32/16 and 128/64."""
    S = k.shape[0]
    t = S - T + i

    def limit(count: int, stride: int) -> int:
        shift = T - (stride - 1)
        behind = -(-shift // stride) if shift < 0 else shift // stride  # C's division truncates
        return (i + 1) // stride - 1 + count - behind

    def logits(head: torch.Tensor, size: int, stride: int) -> list[float]:
        count = max(0, (S - size) // stride + 1)
        means = [k[j * stride : j * stride + size].mean(0) for j in range(count)]
        return [
            float(head @ means[j]) / math.sqrt(len(head))
            for j in range(count)
            if j <= limit(count, stride)
        ]

    shares = [0.0] * max(0, (S - 32) // 16 + 1)
    for head in q:
        coarse = logits(head, 128, 64)
        for j, x in enumerate(logits(head, 32, 16)):
            if coarse:
                shares[j] += math.exp(x) / sum(map(math.exp, coarse))
    own, blocks = t // 64, {}
    for m in range(own + 1):
        touching = [shares[j] for j in range(4 * m - 1, 4 * m + 4) if 0 <= j < len(shares)]
        blocks[m] = max(touching, default=0.0)
        if m < 1 or own - m <= 2:  # local_blocks + 1 blocks: one more than the window holds
            blocks[m] = math.inf
    return set(sorted(blocks, key=lambda m: (-blocks[m], m))[: 4 + 2])


@pytest.mark.parametrize(("S", "T"), [(1040, 1040), (1039, 1039), (1025, 1), (1000, 37)])
def test_equals_the_formulas(S: int, T: int) -> None:
    q, k = torch.randn(1, 3, T, 16).double(), torch.randn(1, 1, S, 16).double()
    got = select_blocks(q, k, CONFIG)
    for i in sorted({0, T // 3, T // 2, T - 16 if T > 16 else 0, T - 2 if T > 1 else 0, T - 1}):
        assert {m for m in got[0, 0, i].tolist() if m >= 0} == by_hand(q[0, :, i], k[0, 0], i, T)


def test_the_frontier_depends_on_the_length_and_ours_does_not() -> None:
    def complete(T: int) -> torch.Tensor:
        return torch.tensor([max(0, (t - 31) // 16 + 1) for t in range(T)])

    cpu = torch.device("cpu")
    # Most prompts see a kernel that is not complete yet; one of 15 mod 16 tokens does not.
    assert (visible_kernels(1040, 64, 16, cpu) == complete(1040) + 1)[31:-1].all()
    assert (visible_kernels(1039, 63, 16, cpu) == complete(1039))[31:].all()
    # The whole point of our own frontier: a token's blocks do not depend on the chunk.
    ours = replace(CONFIG, compat=None)
    q, k = torch.randn(1, 2, 1039, 16), torch.randn(1, 1, 1039, 16)
    whole, chunk = select_blocks(q, k, ours), select_blocks(q[:, :, -17:], k, ours)
    assert torch.equal(whole[:, :, -17:], chunk)


def test_it_runs_in_pytorch_only() -> None:
    q, k = torch.randn(1, 2, 700, 16), torch.randn(1, 1, 700, 16)
    with pytest.raises(ValueError, match="runs in plain PyTorch, not on 'torch'"):
        select_blocks(q, k, CONFIG, backend="torch")
    assert compress_keys(k, CONFIG)[1].shape[2] == 9

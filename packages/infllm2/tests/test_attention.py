from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infllm2 import InfLLMv2Config, block_sparse_attention, infllmv2_attention, select_blocks

BACKENDS = ("reference", "torch", "cpu")  # cpu is skipped where it was not built


def random_sets(
    B: int, K: int, T: int, S: int, n: int, block_size: int, generator: torch.Generator
) -> Tensor:
    """Any sets a caller may pass: no window, later blocks, empty rows."""
    count = -(-S // block_size)
    order = torch.rand(B, K, T, count, generator=generator).argsort(-1)[..., :n]
    sizes = torch.randint(0, n + 1, (B, K, T, 1), generator=generator)
    kept = torch.where(torch.arange(order.shape[-1]) < sizes, order, count).sort(-1).values
    return kept.masked_fill(kept == count, -1).int()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """q, k, v, blocks, block_size of random sizes, with sets from selection or at random."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    S = draw(st.integers(1, 260))
    T = draw(st.one_of(st.integers(0, S), st.just(S), st.integers(0, min(S, 9))))
    B, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 5, 16]))
    D = draw(st.sampled_from([1, 8, 40]))
    q, k, v = (
        torch.randn(B, h, length, D, generator=generator, dtype=torch.float64)
        for h, length in ((K * G, T), (K, S), (K, S))
    )
    block_size = draw(st.sampled_from([4, 12, 16]))
    if draw(st.booleans()):
        blocks = random_sets(B, K, T, S, draw(st.integers(1, 6)), block_size, generator)
    else:
        config = InfLLMv2Config(
            kernel_size=4,
            kernel_stride=2,
            block_size=block_size,
            window_size=block_size * draw(st.integers(1, 4)),
            topk=draw(st.integers(1, 5)),
        )
        blocks = select_blocks(q, k, config)
    return q, k, v, blocks, block_size


@settings(deadline=None, max_examples=50)
@given(problems())
def test_torch_equals_reference(problem: tuple[Tensor, Tensor, Tensor, Tensor, int]) -> None:
    q, k, v, blocks, size = problem
    out, lse = block_sparse_attention(
        q, k, v, blocks, block_size=size, backend="torch", return_lse=True
    )
    expected, expected_lse = block_sparse_attention(
        q, k, v, blocks, block_size=size, backend="reference", return_lse=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(problems())
def test_gradients_equal_reference(problem: tuple[Tensor, Tensor, Tensor, Tensor, int]) -> None:
    q, k, v, blocks, size = problem
    found = {}
    for backend in ("reference", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention(
            *leaves, blocks, block_size=size, backend=backend, return_lse=True
        )
        # The log-sum-exp of a query that sees nothing is −inf and has no gradient.
        loss = (out * torch.linspace(-1, 1, out.shape[-1] or 1)).sum()
        loss = loss + (lse.masked_fill(lse == -math.inf, 0) ** 2).sum()
        loss.backward()
        found[backend] = [x.grad for x in leaves]
    for got, expected in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])  # cpu has no float64
@pytest.mark.parametrize("T", [3, 21])
def test_gradcheck(backend: str, T: int, randn: Callable) -> None:
    q, k, v = (x.requires_grad_() for x in randn(21, T=T, K=2, G=2, D=3, dtype=torch.float64))
    config = InfLLMv2Config(
        kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=3, dense_len=-1
    )
    blocks = select_blocks(q, k, config)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return block_sparse_attention(
            q, k, v, blocks, block_size=4, backend=backend, return_lse=True
        )

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 8, 100, 333])
def test_equals_dense_when_the_budget_covers_the_length(
    backend: str, T: int, randn: Callable
) -> None:
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=64, topk=17, dense_len=-1
    )
    q, k, v = randn(333, T=T, B=2)
    got = infllmv2_attention(q, k, v, config, backend=backend)
    causal = torch.ones(T, 333, dtype=torch.bool).tril(333 - T)
    dense = scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(got, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 300, 1])
def test_coverage_with_one_hot_values(chunk: int | None) -> None:
    """Every position attends to exactly initial ∪ window ∪ chosen, cut by causality.

    With the identity as values, a query's output is its attention weights, key by key.
    """
    S, block = (3000, 64) if chunk != 1 else (700, 16)
    config = InfLLMv2Config(
        kernel_size=block // 2,
        kernel_stride=block // 4,
        block_size=block,
        window_size=4 * block,
        topk=4,
        dense_len=-1,
    )
    q, k = torch.randn(1, 3, S, 8), torch.randn(1, 1, S, 8)
    eye = torch.eye(S)
    columns = 500
    weights = torch.zeros(3, S, S)
    step = chunk or S
    sets = []
    for a in range(0, S, step):
        end = min(a + step, S)
        # 700 single tokens take a while: every seventh is enough to meet every place in a block.
        if chunk == 1 and a % 7:
            continue
        blocks = select_blocks(q[:, :, a:end], k[:, :, :end], config)
        sets.append((a, blocks[0, 0]))
        for c in range(0, end, columns):
            # Values must be as wide as keys, so the identity comes in slices through wider heads.
            wide = [
                torch.nn.functional.pad(x, (0, columns - 8))
                for x in (q[:, :, a:end], k[:, :, :end])
            ]
            values = torch.nn.functional.pad(eye[:end, c : c + columns], (0, columns))[:, :columns]
            part = block_sparse_attention(
                *wide, values[None, None], blocks, block_size=block, scale=8**-0.5
            )
            width = min(columns, S - c)
            weights[:, a:end, c : c + width] = part[0, :, :, :width]
    checked = 0
    for a, blocks in sets:
        for i, row in enumerate(blocks.tolist()):
            t = a + i
            own = t // block
            chosen = {m for m in row if m >= 0}
            window = set(range(max(0, own - 3), own + 1))
            assert {0} | window <= chosen and len(chosen) == min(own + 1, 8)
            visible = torch.zeros(S, dtype=torch.bool)
            for m in chosen:
                visible[m * block : (m + 1) * block] = True
            visible[t + 1 :] = False
            for head in range(3):
                assert torch.equal(weights[head, t] > 0, visible), (head, t)
            checked += 1
    assert checked == (S if chunk != 1 else 100)


def test_dense_switch_looks_at_the_number_of_keys(
    monkeypatch: pytest.MonkeyPatch, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, v = randn(200)
    sparse = infllmv2_attention(q, k, v, small)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (sparse - dense).abs().max() > 1e-3
    at = infllmv2_attention(q, k, v, replace(small, dense_len=200))
    below = infllmv2_attention(q, k, v, replace(small, dense_len=201))
    assert torch.equal(at, sparse)
    assert torch.allclose(below, dense, atol=1e-6)
    for T in (1, 5):
        some = infllmv2_attention(q[:, :, -T:], k, v, replace(small, dense_len=201))
        torch.testing.assert_close(some, dense[:, :, -T:])


def test_selection_takes_no_part_in_the_gradient(small: InfLLMv2Config, randn: Callable) -> None:
    """With values all zero nothing depends on the weights, so nothing reaches q and k."""
    q, k, v = (x.requires_grad_() for x in randn(200))
    infllmv2_attention(q, k, v * 0, small).sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()

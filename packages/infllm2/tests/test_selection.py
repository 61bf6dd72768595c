from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infllm2 import InfLLMv2Config, select_blocks
from infllm2.compression import compress_keys
from infllm2.reference import block_scores, compress

BACKENDS = ("reference", "torch", "cpu")  # cpu is skipped where it was not built


@st.composite
def problems(draw: st.DrawFn, longest: int) -> tuple[Tensor, Tensor, InfLLMv2Config]:
    """Random sizes of everything; float64, so that no two random scores tie by rounding."""
    stride = draw(st.sampled_from([1, 2, 4]))
    block = stride * draw(st.integers(1, 4))
    topk = draw(st.integers(1, 4))
    config = InfLLMv2Config(
        kernel_size=stride * draw(st.integers(1, 6)),
        kernel_stride=stride,
        block_size=block,
        init_blocks=draw(st.integers(0, topk)),
        window_size=block * draw(st.integers(1, 3)),
        topk=topk,
        dense_len=-1,
        lse=draw(st.sampled_from(["approx", "exact"])),
    )
    S = draw(st.integers(0, longest))
    T = draw(st.integers(0, S))
    B, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 5, 16]))
    D = draw(st.sampled_from([1, 8, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(B, K * G, T, D, generator=generator, dtype=torch.float64)
    k = torch.randn(B, K, S, D, generator=generator, dtype=torch.float64)
    return q, k, config


@settings(deadline=None, max_examples=25)
@given(problems(longest=40))
def test_reference_is_the_definition(
    oracle: Callable[..., Tensor], problem: tuple[Tensor, Tensor, InfLLMv2Config]
) -> None:
    q, k, config = problem
    got = select_blocks(q, k, config, backend="reference")
    assert torch.equal(got, oracle(q, k, config))


@settings(deadline=None, max_examples=50)
@given(problems(longest=300))
def test_torch_equals_reference(problem: tuple[Tensor, Tensor, InfLLMv2Config]) -> None:
    q, k, config = problem
    expected = select_blocks(q, k, config, backend="reference")
    got = select_blocks(q, k, config, backend="torch")
    assert got.dtype == torch.int32
    assert torch.equal(got, expected)


def test_compression_is_the_mean_of_complete_kernels() -> None:
    k = torch.randn(1, 1, 71, 3)
    got = compress(k, 32, 16)
    assert got.shape == (1, 1, 3, 3)
    for j in range(3):
        assert torch.allclose(got[0, 0, j], k[0, 0, 16 * j : 16 * j + 32].mean(0), atol=1e-6)
    assert compress(k[:, :, :31], 32, 16).shape[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 17, 512])
def test_blocks_do_not_depend_on_chunks(backend: str, chunk: int, randn: Callable) -> None:
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=5, dense_len=-1
    )
    q, k, _ = randn(700 if backend == "torch" else 300)
    whole = select_blocks(q, k, config, backend=backend)
    S = k.shape[2]
    parts = [
        select_blocks(q[:, :, a : a + chunk], k[:, :, : min(a + chunk, S)], config, backend=backend)
        for a in range(0, S, chunk)
    ]
    assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_lower_index(backend: str, small: InfLLMv2Config) -> None:
    q = torch.zeros(1, 6, 200, 16)
    k = torch.randn(1, 2, 200, 16)
    blocks = select_blocks(q, k, small, backend=backend)
    # Zero queries: every kernel scores the same. Block 0 is initial, then 1 and 2, then the window.
    assert blocks[0, 0, -1].tolist() == [0, 1, 2, 11, 12]
    assert blocks[0, 1, 100].tolist() == [0, 1, 2, 5, 6]


def test_ties_at_the_last_place_only_where_they_are(small: InfLLMv2Config) -> None:
    """Some queries tie and others do not: both kinds in one tile."""
    q, k = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16)
    q[:, :, ::3] = 0
    expected = select_blocks(q, k, small, backend="reference")
    assert torch.equal(select_blocks(q, k, small, backend="torch"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_keys_that_are_not_finite_leave_a_valid_choice(
    backend: str, bad: float, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, _ = randn(300)
    clean = select_blocks(q, k, small, backend=backend)
    k[0, 0, 60, 3] = bad
    blocks = select_blocks(q, k, small, backend=backend)
    assert torch.equal(blocks, select_blocks(q, k, small, backend="reference"))
    # The other head and earlier tokens notice nothing.
    assert torch.equal(blocks[:, 1], clean[:, 1])
    assert torch.equal(blocks[:, :, :60], clean[:, :, :60])
    _check_shape_of_sets(blocks, small)


def _check_shape_of_sets(blocks: Tensor, config: InfLLMv2Config) -> None:
    """Ascending, −1 at the end, as many as fit, initial and window blocks among them."""
    T = blocks.shape[2]
    for t in range(T):
        own = t // config.block_size
        for row in blocks[:, :, t].flatten(0, 1).tolist():
            valid = [m for m in row if m >= 0]
            assert row == valid + [-1] * (len(row) - len(valid))
            assert valid == sorted(set(valid))
            assert len(valid) == min(own + 1, config.budget)
            window = range(max(0, own + 1 - config.window_blocks), own + 1)
            assert {*range(min(config.init_blocks, own + 1)), *window} <= set(valid)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("S", [0, 1, 7, 8, 31, 33])
def test_short_sequences(backend: str, S: int, small: InfLLMv2Config, randn: Callable) -> None:
    q, k, _ = randn(S)
    blocks = select_blocks(q, k, small, backend=backend)
    assert blocks.shape == (1, 2, S, small.budget)
    _check_shape_of_sets(blocks, small)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries(backend: str, small: InfLLMv2Config, randn: Callable) -> None:
    q, k, _ = randn(200, T=0)
    assert select_blocks(q, k, small, backend=backend).shape == (1, 2, 0, small.budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_through_the_choice(
    backend: str, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, _ = randn(200)
    blocks = select_blocks(q.requires_grad_(), k.requires_grad_(), small, backend=backend)
    assert not blocks.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_scored_in_float32(
    dtype: torch.dtype, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, _ = randn(300, dtype=dtype)
    expected = select_blocks(q.float(), k.float(), small)
    assert torch.equal(select_blocks(q, k, small), expected)


def test_transposed_inputs(small: InfLLMv2Config, randn: Callable) -> None:
    q, k, _ = randn(300)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(select_blocks(*strided, small), select_blocks(q, k, small))


def test_approximate_normaliser_only_rescales_a_single_head() -> None:
    """With one head per group the normaliser cannot change the ranking, only the scale."""
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1
    )
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    exact = select_blocks(q, k, replace(config, lse="exact"))
    assert torch.equal(select_blocks(q, k, config), exact)


def test_exact_scores_of_a_head_sum_to_one(small: InfLLMv2Config) -> None:
    from infllm2.reference import kernel_scores

    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    total = kernel_scores(q, *compress_keys(k, small), 100, replace(small, lse="exact")).sum(-1)
    assert torch.allclose(total[..., 7:], torch.ones(()), atol=1e-5)
    assert (total[..., :7] == 0).all()


def test_block_score_is_the_largest_of_the_kernels_that_touch_it(small: InfLLMv2Config) -> None:
    from infllm2.reference import kernel_scores

    q, k = torch.randn(1, 1, 200, 16), torch.randn(1, 1, 200, 16)
    kernels, blocks = (
        scores(q, *compress_keys(k, small), 200, small)[0, 0, -1]
        for scores in (kernel_scores, block_scores)
    )
    # Blocks of 16 tokens, kernels of 8 every 4: block m is touched by kernels 4m − 1 … 4m + 3.
    for m in range(1, 9):
        assert blocks[m] == kernels[4 * m - 1 : 4 * m + 4].max()
    assert blocks[0] == math.inf and (blocks[11:] == math.inf).all()


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "message"),
    [
        ((2, 8, 4), (1, 2, 8, 4), "q must have 4 dimensions"),
        ((1, 2, 8, 4), (2, 2, 8, 4), "agree in batch and head size"),
        ((1, 2, 8, 4), (1, 2, 8, 5), "agree in batch and head size"),
        ((1, 3, 8, 4), (1, 2, 8, 4), "positive multiple"),
        ((1, 2, 9, 4), (1, 2, 8, 4), "got 9 queries and 8 keys"),
    ],
)
def test_shapes_that_do_not_fit(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], message: str, small: InfLLMv2Config
) -> None:
    with pytest.raises(ValueError, match=message):
        select_blocks(torch.zeros(q_shape), torch.zeros(k_shape), small)


def test_dtypes_that_do_not_fit(small: InfLLMv2Config, randn: Callable) -> None:
    q, k, _ = randn(8)
    with pytest.raises(ValueError, match="share dtype and device"):
        select_blocks(q, k.half(), small)
    with pytest.raises(ValueError, match="dtype must be one of"):
        select_blocks(q.int(), k.int(), small, backend="torch")
    with pytest.raises(ValueError, match="no backend can run these inputs"):
        select_blocks(q.int(), k.int(), small)


def test_backend_names(small: InfLLMv2Config, randn: Callable) -> None:
    q, k, _ = randn(8)
    with pytest.raises(ValueError, match="backend must be one of .*got 'cuda'"):
        select_blocks(q, k, small, backend="cuda")

"""However a prompt is cut, with a cache or without: the same blocks, and outputs to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infllm2 import InfLLMv2Config, LayerCache, infllmv2_attention
from infllm2.attention import attend

BACKENDS = ("reference", "torch", "cpu")  # cpu is skipped where it was not built
# Chunks of 512 must be more than one, and no size a multiple of another.
LENGTH = 1100
CONFIG = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=-1
)


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, LENGTH, 16, generator=generator) for heads in (6, 2, 2))


@pytest.fixture(scope="module", params=BACKENDS)
def whole(
    request: pytest.FixtureRequest, tensors: tuple[Tensor, Tensor, Tensor]
) -> tuple[str, Tensor, Tensor]:
    """Backend, output and blocks of the prompt at once."""
    backend = request.param
    if backend == "cpu":
        from infllm2.backends.cpu_library import kernels

        if kernels()[0] is None:
            pytest.skip(kernels()[1])
    return backend, *attend(*tensors, CONFIG, list_blocks=True, backend=backend)


@pytest.mark.parametrize("chunk", [1, 17, 512, LENGTH])
@pytest.mark.parametrize("cached", [False, True])
def test_blocks_and_outputs_do_not_depend_on_chunks(
    whole: tuple[str, Tensor, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    cached: bool,
) -> None:
    (backend, expected, expected_blocks), (q, k, v) = whole, tensors
    cache = LayerCache(CONFIG)
    outs, blocks = [], []
    for first in range(0, LENGTH, chunk):
        # One by one, every fourth token is asked: that meets every place in a kernel or block.
        last = min(first + chunk, LENGTH)
        if cached:
            cache.update(k[:, :, first:last], v[:, :, first:last])
        if chunk == 1 and first % 4 != first // 64 % 4:
            continue
        past = (cache.keys, cache.values) if cached else (k[:, :, :last], v[:, :, :last])
        known = cache.compressed if cached else None
        out, chosen = attend(
            q[:, :, first:last], *past, CONFIG, keys=known, list_blocks=True, backend=backend
        )
        outs.append((slice(first, last), out))
        blocks.append((slice(first, last), chosen))
    for part, chosen in blocks:
        assert torch.equal(chosen, expected_blocks[:, :, part]), part
    for part, out in outs:
        torch.testing.assert_close(out, expected[:, :, part], rtol=0, atol=1e-5)
    assert sum(part.stop - part.start for part, _ in blocks) == (LENGTH if chunk > 1 else 275)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_switch_with_a_cache_is_the_switch_without(dtype: torch.dtype, randn: Callable) -> None:
    """Tokens that came while attention was dense are compressed when it turns sparse."""
    config = replace(CONFIG, dense_len=300)
    q, k, v = randn(400, dtype=dtype)
    cache = LayerCache(config)
    for first, last in ((0, 150), (150, 151), (151, 299), (299, 300), (300, 301), (301, 400)):
        part = slice(first, last)
        got = infllmv2_attention(q[:, :, part], k[:, :, part], v[:, :, part], config, cache=cache)
        alone = infllmv2_attention(q[:, :, part], k[:, :, :last], v[:, :, :last], config)
        assert torch.equal(got, alone), (first, last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(97, 33), (211, 1), (7, 7), (500, 499), (129, 128)])
def test_lengths_that_are_multiples_of_nothing(
    backend: str, lengths: tuple[int, int], randn: Callable
) -> None:
    """Sizes of five kinds, none of which divides the length; the budget covers it: dense."""
    S, T = lengths
    config = InfLLMv2Config(
        kernel_size=9, kernel_stride=3, block_size=15, window_size=45, topk=31, dense_len=-1
    )
    q, k, v = randn(S, T=T, B=3, G=5, D=10)
    got, blocks = attend(q, k, v, config, backend=backend, list_blocks=True)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(got, dense, rtol=0, atol=1e-5)
    assert blocks[0, 0, -1].tolist() == [*range(-(-S // 15)), *[-1] * (34 - -(-S // 15))]

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infllm2 import InfLLMv2Config, block_sparse_attention, infllmv2_attention, select_blocks
from infllm2 import attention as attention_module

BACKENDS = ("reference", "torch", "cpu")  # cpu is skipped where it was not built


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 8, 9, 200])
def test_keys_that_are_not_finite_reach_only_those_who_see_them(
    backend: str, T: int, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, v = randn(200, T=T)
    blocks = select_blocks(q, k, small)
    clean = block_sparse_attention(q, k, v, blocks, block_size=16, backend=backend)
    k[0, 0, 150] = math.nan
    got = block_sparse_attention(q, k, v, blocks, block_size=16, backend=backend)
    positions = torch.arange(200 - T, 200)
    sees = (blocks[0, 0] == 150 // 16).any(-1) & (positions >= 150)
    assert torch.isnan(got[0, :3, sees]).all()
    torch.testing.assert_close(got[0, :3, ~sees], clean[0, :3, ~sees])
    torch.testing.assert_close(got[0, 3:], clean[0, 3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale", "size"), [(100.0, 1.0), (-100.0, 1.0), (32.0, 1e6)])
def test_scattered_blocks_may_outweigh_the_window_by_any_factor(
    backend: str, scale: float, size: float, small: InfLLMv2Config, randn: Callable
) -> None:
    """Logits beyond the range of exp in float32: the shift by the window must not overflow."""
    q, k, v = randn(300)
    q[..., 0], k[..., 0] = 10.0, 0.0
    k[:, :, :16, 0] = scale
    # e^80 is in range, but not e^80 times values of a million.
    v *= size
    got = block_sparse_attention(
        q, k, v, select_blocks(q, k, small), block_size=16, backend=backend
    )
    truth = block_sparse_attention(
        q.double(),
        k.double(),
        v.double(),
        select_blocks(q, k, small),
        block_size=16,
        backend="reference",
    )
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-4 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 500])
def test_error_in_low_precision_is_that_of_rounding(
    dtype: torch.dtype, T: int, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, v = randn(500, T=T, dtype=dtype)
    blocks = select_blocks(q, k, small)
    got = block_sparse_attention(q, k, v, blocks, block_size=16)
    assert got.dtype == dtype
    truth = block_sparse_attention(
        q.double(), k.double(), v.double(), blocks, block_size=16, backend="reference"
    )
    eps = torch.finfo(dtype).eps
    assert (got.double() - truth).abs().max() <= 8 * eps * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sets_that_skip_the_own_block(backend: str, randn: Callable) -> None:
    """The block before and the block after, not the own one: no window may be assumed."""
    q, k, v = randn(64, T=56)
    own = torch.arange(8, 64)[:, None] // 8
    # In the last block, which has none after it, the own one takes that place.
    blocks = torch.cat([own - 1, (own + 1).clamp(max=7)], 1).int().expand(1, 2, 56, 2)
    out = block_sparse_attention(q, k, v, blocks, block_size=8, backend=backend)
    for i in range(48):
        keys = slice(i // 8 * 8, i // 8 * 8 + 8)
        alone = scaled_dot_product_attention(
            q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys], enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, i : i + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("S", "T"), [(0, 0), (50, 0), (1, 1), (5, 5), (50, 50)])
def test_small_and_empty(
    backend: str, S: int, T: int, small: InfLLMv2Config, randn: Callable
) -> None:
    q, k, v = randn(S, T=T)
    out = infllmv2_attention(q, k, v, small, backend=backend)
    assert out.shape == q.shape
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if T:
        dense = scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
        torch.testing.assert_close(out, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [2, 40])
def test_a_query_that_sees_nothing_gets_zero(backend: str, T: int, randn: Callable) -> None:
    q, k, v = randn(40, T=T)
    blocks = torch.full((1, 2, T, 2), -1, dtype=torch.int32)
    blocks[:, :, -1, 0] = 0
    out, lse = block_sparse_attention(
        q, k, v, blocks, block_size=16, backend=backend, return_lse=True
    )
    assert (out[:, :, :-1] == 0).all() and (lse[:, :, :-1] == -math.inf).all()
    assert (out[:, :, -1] != 0).all() and lse[:, :, -1].isfinite().all()


@pytest.mark.parametrize("T", [1, 300])
def test_transposed_inputs_and_scale(T: int, small: InfLLMv2Config, randn: Callable) -> None:
    q, k, v = randn(300, T=T, B=2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    blocks = select_blocks(q, k, small)
    got = block_sparse_attention(*strided, blocks, block_size=16, scale=0.3)
    want = block_sparse_attention(q, k, v, blocks, block_size=16, scale=0.3, backend="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_strips_of_queries_join(
    monkeypatch: pytest.MonkeyPatch, small: InfLLMv2Config, randn: Callable
) -> None:
    """Prompts longer than one strip: same output and gradients as in one."""
    from infllm2.backends import torch_backend, torch_selection

    found = []
    for strip, tile, blocks_at_once in ((8192, 32 << 20, 16), (50, 4000, 3)):
        monkeypatch.setattr(torch_backend, "STRIP", strip)
        monkeypatch.setattr(torch_selection, "TILE_BYTES", tile)
        monkeypatch.setattr(torch_selection, "STRIP_BLOCKS", blocks_at_once)
        torch.manual_seed(1)
        q, k, v = (x.requires_grad_() for x in randn(333, dtype=torch.float64))
        out = infllmv2_attention(q, k, v, small)
        out.pow(2).sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_auto_logs_its_choice_once(
    caplog: pytest.LogCaptureFixture, small: InfLLMv2Config, randn: Callable
) -> None:
    from infllm2 import backends

    backends.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="infllm2"):
        for _ in range(3):
            infllmv2_attention(*randn(40), small)
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("backend=auto runs '")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (torch.zeros(1, 2, 40, 1), "int32 or int64"),
        (torch.zeros(1, 6, 40, 1, dtype=torch.int32), "blocks must be .*key-value heads"),
        (torch.full((1, 2, 40, 1), 3, dtype=torch.int32), "must lie in -1 … 2"),
        (torch.full((1, 2, 40, 1), -2, dtype=torch.int32), "must lie in -1 … 2"),
        (torch.zeros(1, 2, 40, 2, dtype=torch.int32), "must ascend without repetition"),
        (torch.tensor([[[[-1, 0]]]], dtype=torch.int32).expand(1, 2, 40, 2), "must ascend"),
    ],
)
def test_blocks_that_do_not_fit(blocks: Tensor, message: str, randn: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*randn(40), blocks, block_size=16)


def test_values_that_do_not_fit(randn: Callable) -> None:
    q, k, v = randn(40)
    blocks = torch.zeros(1, 2, 40, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="k and v must have one shape"):
        block_sparse_attention(q, k, v[:, :, :39], blocks)
    with pytest.raises(ValueError, match="block_size must be a positive integer"):
        block_sparse_attention(q, k, v, blocks, block_size=0)


def test_attention_memory_grows_with_the_budget_not_the_length(small: InfLLMv2Config) -> None:
    """No tensor of the size queries × keys is ever made: the largest is counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                # Views and expansions own no memory.
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    S = 4096
    q, k, v = torch.randn(1, 2, S, 16), torch.randn(1, 1, S, 16), torch.randn(1, 1, S, 16)
    with Largest() as mode:
        attention_module.attend(q, k, v, small)
    assert mode.numel < S * S / 16

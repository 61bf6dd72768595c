"""Caches: whatever is appended, taken back or reordered, results are those of the tokens left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from infllm2 import InfLLMv2Config, LayerCache, infllmv2_attention, select_blocks
from infllm2.compression import compress, compress_keys

CONFIG = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=2, dense_len=-1
)


class AnySequence(RuleBasedStateMachine):
    """Appends, crops and reorders; the tokens left are kept beside, to start from."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.cache = LayerCache(CONFIG)
        self.k = self.v = torch.zeros(2, 2, 0, 8)
        self.append(3)

    def _random(self, heads: int, n: int) -> Tensor:
        return torch.randn(self.k.shape[0], heads, n, 8, generator=self.generator)

    @rule(n=st.sampled_from([1, 2, 15, 64, 130]))
    def append(self, n: int) -> None:
        q, k, v = self._random(6, n), self._random(2, n), self._random(2, n)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        got = infllmv2_attention(q, k, v, CONFIG, cache=self.cache)
        assert torch.equal(got, infllmv2_attention(q, self.k, self.v, CONFIG))

    @rule(n=st.sampled_from([0, 1, 5, 40, 1000]))
    def crop(self, n: int) -> None:
        length = max(0, self.k.shape[2] - n)
        self.cache.crop(length)
        self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]

    @rule(rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder(torch.tensor(rows))
        self.k, self.v = self.k[rows], self.v[rows]

    @invariant()
    def holds_what_is_left(self) -> None:
        assert self.cache.length == self.k.shape[2]
        assert torch.equal(self.cache.keys, self.k) and torch.equal(self.cache.values, self.v)
        if self.k.shape[2] > CONFIG.budget * CONFIG.block_size:
            keys = self.cache.compressed()
            fine, coarse = compress_keys(self.k, CONFIG)
            assert torch.equal(keys.fine, fine) and torch.equal(keys.coarse, coarse)


AnySequence.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestAnySequence = AnySequence.TestCase


def test_both_levels_at_once_are_each_level_alone() -> None:
    k = torch.randn(2, 3, 203, 5)
    fine, coarse = compress_keys(k, CONFIG)
    assert torch.equal(fine, compress(k, 8, 4))
    torch.testing.assert_close(coarse, compress(k, 32, 16))
    assert fine.shape[2] == 49 and coarse.shape[2] == 11


def test_rows_that_start_later_are_counted_from_their_start() -> None:
    cache = LayerCache(CONFIG)
    k = torch.randn(3, 2, 200, 8)
    for start in range(0, 200, 7):
        cache.update(k[:, :, start : start + 7], k[:, :, start : start + 7])
        if cache.length > 150:
            keys = cache.compressed(3, cache.length - 2, (0, 2))
            fine, coarse = compress_keys(k[[0, 2], :, 3 : cache.length - 2], CONFIG)
            assert torch.equal(keys.fine, fine) and torch.equal(keys.coarse, coarse)
            assert keys.length == cache.length - 5


def test_tokens_of_another_kind_are_refused() -> None:
    cache = LayerCache(CONFIG)
    cache.update(*(torch.randn(1, 2, 5, 8) for _ in range(2)))
    with pytest.raises(ValueError, match=r"new keys \(2, 2, 1, 8\) .* one cache serves one batch"):
        cache.update(*(torch.randn(2, 2, 1, 8) for _ in range(2)))
    with pytest.raises(ValueError, match="of the new tokens alone, got 3 queries and 2 keys"):
        infllmv2_attention(
            torch.randn(1, 2, 3, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8),
            CONFIG, cache=cache,
        )  # fmt: skip
    cache.reset()
    cache.update(*(torch.randn(2, 2, 1, 8) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_are_each_alone(dtype: torch.dtype) -> None:
    ends = [0, 1, 1, 150, 151, 400]
    q, k, v = (torch.randn(1, h, 400, 8).to(dtype).requires_grad_() for h in (4, 2, 2))
    got = infllmv2_attention(q, k, v, CONFIG, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    for start, end in zip(ends, ends[1:], strict=False):
        alone = infllmv2_attention(*(x[:, :, start:end] for x in (q, k, v)), CONFIG)
        assert torch.equal(got[:, :, start:end], alone)
    got[:, :, 150].float().sum().backward()
    assert v.grad[:, :, 150].abs().sum() > 0 and not v.grad[:, :, :150].any()
    with pytest.raises(
        ValueError, match=r"ascend from 0 to the 400 packed positions, got \[0, 9\]"
    ):
        infllmv2_attention(q, k, v, CONFIG, cu_seqlens=torch.tensor([0, 9]))


def test_selection_before_rotary_embedding(randn: Callable) -> None:
    from dataclasses import replace

    config = replace(CONFIG, use_nope=True)
    (q, k, v), (plain_q, plain_k, _) = randn(300), randn(300)
    got = infllmv2_attention(q, k, v, config, unrotated=(plain_q, plain_k))
    from infllm2 import block_sparse_attention

    blocks = select_blocks(plain_q, plain_k, CONFIG)
    assert torch.equal(got, block_sparse_attention(q, k, v, blocks, block_size=16))
    with pytest.raises(ValueError, match=r"pass them as unrotated=\(q, k\)"):
        infllmv2_attention(q, k, v, config)

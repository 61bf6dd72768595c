from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from locret import LocretConfig, chunked_prefill, evict, importance


def qkv(b: int, h: int, j: int, t: int, d: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, t, d, generator=generator) for n in (h, j, j)]


def test_labels_are_the_definition() -> None:
    q, k, _ = qkv(2, 6, 2, 9, 4)
    answer = q[:, :, -3:]
    found = importance(answer, k)
    for b in range(2):
        for j in range(2):
            for t in range(9):
                best = max(
                    float(answer[b, h, a] @ k[b, j, t]) / math.sqrt(4)
                    for h in range(3 * j, 3 * j + 3)
                    for a in range(3)
                )
                assert found[b, j, t] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 100])
def test_with_room_for_all_it_is_dense_attention(chunk: int) -> None:
    q, k, v = qkv(2, 6, 2, 20, 8)
    config = LocretConfig(budget=20, chunk=chunk, stabilisers=0)
    found = chunked_prefill(q, k, v, torch.randn(2, 2, 20), config)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (found.out - dense).abs().max() < 1e-5
    assert all(len(kept) == 20 for row in found.kept for kept in row)


SIZES = st.tuples(
    st.integers(1, 12), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3)
).filter(lambda s: s[2] + s[3] <= s[0])


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 30), st.integers(0, 3))
def test_the_cache_stays_bounded_ordered_and_keeps_its_sinks(sizes, t: int, seed: int) -> None:
    budget, chunk, stabilisers, sinks = sizes
    config = LocretConfig(budget=budget, chunk=chunk, stabilisers=stabilisers, sinks=sinks)
    q, k, v = qkv(1, 4, 2, t, 4, seed)
    scores = torch.randn(1, 2, t, generator=torch.Generator().manual_seed(seed))
    found = chunked_prefill(q, k, v, scores, config)
    assert found.peak <= budget + chunk
    for kept in found.kept[0]:
        assert len(kept) == min(budget, t)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert set(range(min(sinks, t))) <= set(kept.tolist())
    again = chunked_prefill(q, k, v, scores, config)
    assert torch.equal(again.out, found.out)


def test_a_query_sees_exactly_what_was_left_before_it() -> None:
    q, k, _ = qkv(1, 1, 1, 6, 4)
    values = torch.eye(6)[None, None]  # the output is the weight on each position
    scores = torch.tensor([[[5.0, 1, 4, 0, 3, 2]]])
    config = LocretConfig(budget=2, chunk=2, stabilisers=0)
    found = chunked_prefill(q[..., :4], k[..., :4], values, scores, config)
    seen = [set((row > 0).nonzero().flatten().tolist()) for row in found.out[0, 0]]
    # After two chunks 0 and 2 are the best; 1 and 3 are gone when 4 and 5 look.
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 4}, {0, 2, 4, 5}]
    assert found.kept[0][0].tolist() == [0, 2]


def test_stabilisers_survive_until_the_last_chunk() -> None:
    scores, places = torch.tensor([9.0, 8.0, 7.0, 0.0, 1.0]), torch.arange(5)
    config = LocretConfig(budget=3, chunk=2, stabilisers=2)
    assert evict(scores, places, config).tolist() == [0, 3, 4]
    assert evict(scores, places, config, last=True).tolist() == [0, 1, 2]


def test_of_equal_scores_the_older_stay() -> None:
    config = LocretConfig(budget=3, chunk=1, stabilisers=0)
    assert evict(torch.zeros(7), torch.arange(7), config).tolist() == [0, 1, 2]


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match=r"budget 4 does not hold stabilisers 3 \+ sinks 2"):
        LocretConfig(budget=4, stabilisers=3, sinks=2)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        LocretConfig(budget=0, stabilisers=0)
    with pytest.raises(ValueError, match="score 1 is NaN"):
        evict(torch.tensor([0.0, math.nan]), torch.arange(2), LocretConfig())
    q, k, v = qkv(1, 3, 2, 5, 4)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        importance(q, k)
    with pytest.raises(ValueError, match="at least one answer token"):
        importance(q[:, :2, :0], k)
    with pytest.raises(ValueError, match="expected scores"):
        chunked_prefill(q[:, :2], k, v, torch.zeros(1, 2, 4), LocretConfig())

"""`dense_len`: a number, or measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm2 import InfLLMv2Config, backends, infllmv2_attention, switch
from infllm2.attention import attend

AUTO = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len="auto"
)


@pytest.fixture(autouse=True)
def _forget() -> None:
    switch._measured.cache_clear()


def clock(monkeypatch: pytest.MonkeyPatch, sparse_wins_from: int) -> list[int]:
    """Replace timing: dense takes 1, sparse less from that many keys on. Returns lengths asked."""
    asked = []

    def seconds(function, device) -> float:  # noqa: ANN001
        c, length = function.__defaults__[0], function.__defaults__[2]
        asked.append(length)
        return 1.0 if c.dense_len != -1 else (0.5 if length >= sparse_wins_from else 1.5)

    monkeypatch.setattr(switch, "_seconds", seconds)
    return asked


def test_the_switch_is_where_sparse_attention_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clock(monkeypatch, sparse_wins_from=160)
    q, k, v = (torch.randn(1, h, 200, 16) for h in (6, 2, 2))
    found = switch.dense_below(AUTO, q, k, "auto")
    assert 160 <= found <= 240 and found in asked
    before = len(asked)
    assert switch.dense_below(AUTO, q[:, :, -1:], k[:, :, :150], "auto") == found
    assert len(asked) == before, "measured once for each shape"


def test_never_faster_means_dense_for_all_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, sparse_wins_from=10**9)
    q, k, v = (torch.randn(1, h, 400, 16) for h in (6, 2, 2))
    budget = AUTO.budget * AUTO.block_size
    assert switch.dense_below(AUTO, q, k, "auto") == int(switch.LADDER[-1] * budget)


def test_short_prompts_cost_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = clock(monkeypatch, sparse_wins_from=0)
    q, k, v = (torch.randn(1, h, 60, 16) for h in (6, 2, 2))
    out = infllmv2_attention(q, k, v, AUTO)
    assert not asked
    wanted = infllmv2_attention(q, k, v, replace(AUTO, dense_len=-1))
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_both_sides_of_a_real_measurement() -> None:
    q, k, v = (torch.randn(1, h, 700, 16) for h in (6, 2, 2))
    least = switch.dense_below(AUTO, q, k, "auto")
    assert AUTO.budget * AUTO.block_size <= least
    _, blocks = attend(q, k, v, replace(AUTO, dense_len=least))
    assert (blocks is None) == (700 < least)
    auto = infllmv2_attention(q, k, v, AUTO)
    fixed = infllmv2_attention(q, k, v, replace(AUTO, dense_len=least))
    assert torch.equal(auto, fixed)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_where_all_is_visited_lists_are_made_only_on_demand(backend: str) -> None:
    config = replace(AUTO, dense_len=-1)
    q, k, v = (torch.randn(1, h, 70, 16) for h in (6, 2, 2))
    out, blocks = attend(q, k, v, config, backend=backend)
    listed, all_blocks = attend(q, k, v, config, backend=backend, list_blocks=True)
    torch.testing.assert_close(out, listed, atol=1e-5, rtol=0)
    assert (blocks is None) == hasattr(backends.get(backend), "dense")
    assert all_blocks is not None and int(all_blocks[0, 0, -1].max()) == 69 // 16


@pytest.mark.parametrize("wrong", ["Auto", 1.5, -2, None])
def test_what_dense_len_may_not_be(wrong: object) -> None:
    with pytest.raises(ValueError, match='dense_len must be an integer of at least -1 or "auto"'):
        InfLLMv2Config(dense_len=wrong)

from __future__ import annotations

import numpy as np
import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import LocretConfig, RetainingHeads, prefill  # noqa: E402
from locret import context as context_module  # noqa: E402
from locret.costs import Shape, costs  # noqa: E402
from locret.visualise import kept_map  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 20, 24, 61, 100])
@pytest.mark.parametrize("local", [0, 5])
def test_closed_forms_are_what_is_done(tokens: int, local: int, monkeypatch) -> None:
    model = testbed.tiny("llama-gqa3")
    config = LocretConfig(budget=16, chunk=8, stabilisers=4, local=local)
    pairs: list[int] = []
    held: list[int] = []
    right = context_module.attend

    def counted(q, k, v, mask, scaling, bias):
        new, n = q.shape[2], k.shape[2]
        pairs.append(sum(n - new + i + 1 for i in range(new)))
        held.append(k.nbytes + v.nbytes)
        return right(q, k, v, mask, scaling, bias)

    monkeypatch.setattr(context_module, "attend", counted)
    heads = RetainingHeads.for_model(model, hidden=8)
    prefill(model, heads, torch.randint(5, 250, (1, tokens)), config)
    c = costs(Shape.of(model.config), tokens, config, hidden=8, bytes_per_value=4)
    assert 2 * c.pairs == sum(pairs) and c.chunks == len(pairs) / 2
    assert c.held_bytes == 2 * max(held)
    assert c.head_parameters == sum(p.numel() for p in heads.parameters())
    assert c.attention_flops == 4 * 2 * 6 * 16 * c.pairs
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert c.linear_flops == 2 * linear * tokens
    if tokens <= 16:
        assert c.pairs == c.full_pairs and c.held_bytes == c.full_bytes


@torch.no_grad()
@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize("budgets", ["uniform", "head", "layer"])
@pytest.mark.parametrize("merge", [None, 0.5])
def test_every_byte_is_counted(storage: str, budgets: str, merge: float | None) -> None:
    """The buffers' own sizes when they are fullest: a chunk beside a full budget, all layers."""
    model = testbed.tiny("llama-gqa3")
    config = LocretConfig(
        budget=16, chunk=8, stabilisers=4, local=8, storage=storage, budgets=budgets, merge=merge
    )
    cache = prefill(model, "keynorm", torch.randint(5, 250, (1, 48)), config)
    c = costs(Shape.of(model.config), 48, config, bytes_per_value=4)
    assert cache.kv_bytes() == c.held_bytes  # the tail of 8 was read after the last eviction
    noted = cache.note_bytes()
    turned = sum(x.turns.nbytes for x in cache.layers if x.turns is not None)
    if budgets == "uniform":  # what came last has not turned
        assert noted == c.note_bytes - turned // 16 * 8
    assert noted <= c.note_bytes


def test_long_prompts_pay_for_budget_and_chunk_alone() -> None:
    shape = Shape(32, 32, 8, 128, 4096, 14336)
    config = LocretConfig()
    short, long = costs(shape, 131072, config), costs(shape, 1 << 20, config)
    assert short.held_bytes == long.held_bytes == 2 * 32 * 8 * 128 * 2 * config.capacity
    assert long.prefill_speedup > short.prefill_speedup > 1
    with pytest.raises(ValueError, match="at least 1"):
        costs(shape, 0, config)


def test_kept_map_counts_tokens_of_each_part() -> None:
    kept = [torch.tensor([[[0, 1, 9], [4, 5, -1]]]), torch.tensor([[[0, 1, 2], [7, 8, 9]]])]
    expected = [[1, 0, 0, 0, 0.5], [0, 0, 1, 0, 0], [1, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 1]]
    assert np.array_equal(kept_map(kept, 10, bins=5), expected)
    with pytest.raises(ValueError, match="position 9 was kept of a prompt of 9"):
        kept_map(kept, 9)

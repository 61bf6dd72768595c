from __future__ import annotations

from dataclasses import replace

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import LocretCache, LocretConfig, RetainingHeads, generate, locret, prefill  # noqa: E402
from locret.budgets import shared_limits  # noqa: E402
from locret.interface import exchanged  # noqa: E402
from locret.layer_store import LayerStore  # noqa: E402
from locret.reference import _attend  # noqa: E402

SMALL = LocretConfig(budget=16, chunk=8, stabilisers=4, local=5, sinks=2)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 250, (rows, length), generator=generator)


@pytest.fixture(scope="module")
def model():
    return testbed.tiny("llama-gqa3", num_hidden_layers=3)


@pytest.fixture(scope="module")
def heads(model):
    """Heads of which some look at one entry and some at all: their scores' spreads differ."""
    torch.manual_seed(0)
    found = RetainingHeads.for_model(model, hidden=8)
    with torch.no_grad():
        for at, layer in enumerate(found.layers):
            layer.fc2.weight.mul_(torch.tensor([[1.0], [20.0 + 20 * at]]))
    return found


def greedy(worth: list[list[float]], budget: int, floor: int, ceiling: int) -> list[int]:
    """One entry at a time: the best next of all lanes that may have one more."""
    counts = [min(floor, len(lane)) for lane in worth]
    while sum(counts) < len(worth) * budget:
        open_ = [i for i, lane in enumerate(worth) if counts[i] < min(ceiling, len(lane))]
        if not open_:
            break
        counts[max(open_, key=lambda i: worth[i][counts[i]])] += 1
    return counts


def test_limits_are_the_greedy_choice() -> None:
    config = LocretConfig(budget=6, chunk=4, stabilisers=2, sinks=1, budgets="head")
    assert (config.floor, config.ceiling) == (3, 12)
    torch.manual_seed(0)
    for n in (1, 4, 9, 20):
        worth = (
            (torch.randn(5, 3, n) * torch.tensor([1, 3, 0.2])[:, None])
            .sort(-1, descending=True)
            .values
        )
        counts = torch.randint(1, n + 1, (5, 3))
        got = shared_limits(worth, counts, config)
        for row in range(5):
            lanes = [worth[row, i, : counts[row, i]].tolist() for i in range(3)]
            assert got[row].tolist() == greedy(lanes, 6, 3, 12)
    even = shared_limits(torch.zeros(1, 3, 9), torch.full((1, 3), 9), config)
    assert even.tolist() == [[6, 6, 6]]  # of equal worth nobody has more


@torch.no_grad()
@pytest.mark.parametrize("budgets", ["head", "layer"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_sum_is_never_more_than_uniform_budgets(model, heads, budgets, rows, monkeypatch):
    """Counted in the bytes of all layers after every append, prompt and continuation."""
    config, cache = replace(SMALL, budgets=budgets), None
    ids, mask = tokens(rows, 100), torch.ones(rows, 100, dtype=torch.long)
    mask[1:2, :23], mask[2:, :97] = 0, 0
    seen, most, right = [], [], LayerStore.update

    def update(self, *args):
        out = right(self, *args)
        seen.append(cache.kv_bytes())
        real = self.lane_counts().max()  # before the new are noted
        most.append(int(real) + args[0].shape[2])
        return out

    monkeypatch.setattr(LayerStore, "update", update)
    cache = LocretCache(config)
    with locret(model, heads, config):
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=60, do_sample=False
        )
    entry = 2 * 16 * 4
    assert max(seen) <= rows * 3 * 2 * config.capacity * entry
    assert max(most) <= config.ceiling + config.chunk and cache.peak <= max(most)
    again = prefill(model, heads, ids[:1], replace(config, local=0))
    counts = torch.stack([layer.lane_counts()[0] for layer in again.layers])
    assert counts.sum() == 3 * 2 * 16 and counts.min() >= config.floor
    assert counts.max() > 16 and counts.max() <= config.ceiling
    if budgets == "head":
        assert counts.sum(1).tolist() == [32] * 3
    else:
        assert (counts[:, 0] == counts[:, 1]).all()
    assert again.kv_bytes() == 3 * 2 * 16 * entry  # of memory, not of a mask
    for positions in again.kept():
        for head in positions[0]:
            kept = head[head >= 0].tolist()
            assert kept == sorted(set(kept)) and kept[:2] == [0, 1]


@torch.no_grad()
def test_heads_of_different_lengths_attend_as_the_definition(model, heads) -> None:
    """Layer 0 against a loop over heads and chunks, its budgets by `greedy`."""
    ids, seen = tokens(1, 61), {}

    def attend(call):
        seen.setdefault(call.layer, call)
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, enable_gqa=True
        )

    with exchanged(model, attend):
        model(input_ids=ids, use_cache=False)
    call = seen[0]
    config = LocretConfig(
        budget=16, chunk=8, stabilisers=4, local=0, sinks=2, positions="original", budgets="head"
    )
    scores = heads.layers[0](call.hidden)[0]
    held = [torch.empty(0, dtype=torch.long)] * 2
    expected = torch.empty_like(call.q)
    for start in range(0, 61, 8):
        new, last = torch.arange(start, min(start + 8, 61)), start + 8 >= 61
        order = []
        for head in range(2):
            held[head] = torch.cat([held[head], new])
            there, mine = held[head], slice(3 * head, 3 * head + 3)
            expected[0, mine, new] = _attend(
                call.q[0, mine, new], call.k[0, head, there], call.v[0, head, there], new, there
            )
            share = scores[head, there].log_softmax(-1)
            share[there < 2] = torch.inf
            if not last:
                share[-4:] = torch.inf
            order.append(share.sort(dim=-1, descending=True, stable=True))
        limits = greedy([o.values.tolist() for o in order], 16, 8, 32)
        for head in range(2):
            held[head] = held[head][order[head].indices[: limits[head]].sort().values]
    assert len(held[0]) != len(held[1])
    outs: list[torch.Tensor] = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda m, args: outs.append(args[0])
    )
    cache = prefill(model, heads, ids, config)
    handle.remove()
    assert (torch.cat(outs, 1) - expected.transpose(1, 2).flatten(2)).abs().max() < 1e-5
    for head in range(2):
        kept = cache.kept()[0][0, head]
        assert kept[kept >= 0].tolist() == held[head].tolist()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize(
    "options",
    [{"budgets": "head"}, {"budgets": "layer"}, {"merge": 0.2}, {"storage": "int4"},
     {"budgets": "head", "merge": 0.2, "storage": "int8"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("scorer", ["heads", "expected"])
def test_rows_give_what_they_give_alone(model, heads, options, positions, scorer) -> None:
    config = replace(SMALL, positions=positions, **options)
    eye = heads if scorer == "heads" else scorer
    ids, mask = tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[1, :23], mask[2, :57] = 0, 0
    more = {"max_new_tokens": 30, "do_sample": False}
    found = generate(model, eye, ids, config, attention_mask=mask, **more)
    assert torch.equal(found, generate(model, eye, ids, config, attention_mask=mask, **more))
    for row, start in enumerate((0, 23, 57)):
        alone = generate(model, eye, ids[row : row + 1, start:], config, **more)
        assert torch.equal(found[row : row + 1], alone)


@torch.no_grad()
@pytest.mark.parametrize("budgets", ["head", "layer"])
def test_with_room_for_all_it_is_the_model(model, heads, budgets: str) -> None:
    ids = tokens(2, 37)
    config = replace(SMALL, budget=40, budgets=budgets)
    with locret(model, heads, config):
        out = model(input_ids=ids).logits
    assert (out - model(ids).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match='budgets must be one of "uniform", "layer", "head"'):
        replace(SMALL, budgets="x")

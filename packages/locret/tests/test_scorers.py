from __future__ import annotations

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import HeadsAndKeyDiff, LocretConfig, RetainingHeads, prefill  # noqa: E402
from locret.interface import exchanged  # noqa: E402
from locret.scorers import SCORERS, ExpectedAttention, KeyDiff, SnapKV  # noqa: E402

# Everything is read in one piece and pruned once: the papers' setting, and dense attention before.
ONE = LocretConfig(budget=20, chunk=64, stabilisers=0, local=0, positions="original")


@pytest.fixture(scope="module")
def seen():
    """A model, ids, and the first layer's dense q, k, v of them."""
    model = testbed.tiny("llama-gqa3")
    ids = torch.randint(5, 250, (1, 60), generator=torch.Generator().manual_seed(3))
    calls: dict = {}

    def attend(call):
        calls[call.layer] = call
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, enable_gqa=True
        )

    with torch.no_grad(), exchanged(model, attend):
        model(input_ids=ids, use_cache=False)
    return model, ids, calls[0]


def kept(model, scorer, ids, config=ONE) -> list[list[int]]:
    return prefill(model, scorer, ids, config).kept()[0][0].tolist()


def best(scores: torch.Tensor, count: int = 20) -> list[list[int]]:
    return scores.topk(count, -1).indices.sort(-1).values.tolist()


def attention(call) -> torch.Tensor:
    k = call.k[0].repeat_interleave(3, 0)
    logits = call.q[0] @ k.transpose(1, 2) / 4
    logits.masked_fill_(torch.ones(60, 60).triu(1).bool(), -torch.inf)
    return logits.softmax(-1)


def test_streaming_keeps_sinks_and_the_newest(seen) -> None:
    model, ids, _ = seen
    assert kept(model, "streaming", ids) == [[*range(4), *range(44, 60)]] * 2


def test_keynorm_keeps_small_keys(seen) -> None:
    model, ids, call = seen
    assert kept(model, "keynorm", ids) == best(-call.k[0].norm(dim=-1))


def test_keydiff_keeps_what_is_unlike_the_mean(seen) -> None:
    model, ids, call = seen
    unit = call.k[0] / call.k[0].norm(dim=-1, keepdim=True)
    cosine = torch.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1)
    assert kept(model, KeyDiff(), ids) == best(-cosine)


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_heads_and_keydiff_add_up_in_standard_deviations(seen, weight) -> None:
    """In one piece; and in chunks, where the heads' scores must follow what is kept."""
    model, ids, call = seen
    torch.manual_seed(4)
    heads = RetainingHeads.for_model(model, hidden=8)
    both = HeadsAndKeyDiff(heads, weight)
    everything = LocretConfig(budget=64, chunk=64, stabilisers=0, local=0, positions="original")
    said = prefill(model, heads, ids, everything).layers[0].scores[0]
    standard = lambda x: (x - x.mean(-1, True)) / x.std(-1, unbiased=False, keepdim=True)  # noqa: E731

    def score(keep: torch.Tensor) -> torch.Tensor:
        """Of entries [J, n] in a layer that holds them."""
        index = keep[..., None].expand(-1, -1, 16)
        unit = torch.nn.functional.normalize(call.k[0].gather(1, index), dim=-1)
        unlike = -torch.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1)
        return standard(said.gather(1, keep)) + weight * standard(unlike)

    assert kept(model, both, ids) == best(score(torch.arange(60).expand(2, 60)))
    chunks = LocretConfig(budget=20, chunk=10, stabilisers=0, local=0, positions="original")
    held = torch.arange(20).expand(2, 20)
    for first in range(20, 60, 10):  # keys of the first layer do not depend on what is kept
        held = torch.cat([held, torch.arange(first, first + 10).expand(2, 10)], 1)
        held = held.gather(1, torch.tensor(best(score(held))))
    assert kept(model, both, ids, chunks) == held.tolist()


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_that_means_nothing_is_refused(seen, weight) -> None:
    with pytest.raises(ValueError, match="weight must be finite and 0 or more"):
        HeadsAndKeyDiff(RetainingHeads.for_model(seen[0], hidden=8), weight)


def test_h2o_sums_the_attention_received(seen) -> None:
    model, ids, call = seen
    mass = attention(call).sum(1).view(2, 3, 60).sum(1)
    assert kept(model, "h2o", ids) == best(mass)


def test_snapkv_pools_the_window_s_attention(seen) -> None:
    model, ids, call = seen
    weights = attention(call)[:, -8:].mean(1).view(2, 3, 60).mean(1)
    pooled = torch.stack([weights[:, max(0, t - 1) : t + 2].mean(1) for t in range(60)], dim=1)
    pooled[:, -8:] = 9
    assert kept(model, SnapKV(window=8, kernel=3), ids) == best(pooled)


def test_expected_attention_is_the_mean_over_sampled_queries(seen) -> None:
    """E[exp(q · k)] of normal queries, against a hundred thousand drawn ones."""
    model, ids, call = seen
    q, _ = call.unrotated()
    q = q[0, :, 4:].double()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    future = 3
    cos, sin = model.model.rotary_emb(call.hidden, torch.arange(60, 60 + future)[None])
    turned = 0
    for at in range(future):  # the paper turns by the mean rotation
        part = apply_rotary_pos_emb(q[None], q[None], cos[:, at : at + 1], sin[:, at : at + 1])
        turned = turned + part[0][0] / future
    mean = turned.mean(1, keepdim=True)
    root = (turned - mean) / q.shape[1] ** 0.5
    noise = torch.randn(100_000, q.shape[1], generator=torch.Generator().manual_seed(0)).double()
    scores = torch.empty(2, 60).double()
    for j in range(2):
        weights = []
        for h in range(3 * j, 3 * j + 3):
            draws = mean[h] + noise @ root[h]
            weights.append(((draws @ call.k[0, j].double().T) / 4).exp().mean(0))
        weights = torch.stack([w / w.sum() for w in weights]).mean(0)
        scores[j] = weights * call.v[0, j].double().norm(dim=-1)
    scores[:, :4] = 9
    found = kept(model, ExpectedAttention(future=future), ids)
    for mine, theirs in zip(found, best(scores), strict=True):
        assert len(set(mine) & set(theirs)) >= 19


def test_random_is_uniform_and_differs_by_seed(seen) -> None:
    model, ids, _ = seen
    long = torch.arange(5, 245).repeat(1, 20)[:, :4000]
    config = LocretConfig(budget=1000, chunk=4000, stabilisers=0, local=0, positions="original")
    first = prefill(model, SCORERS["random"](), long, config).kept()[0][0]
    other = prefill(model, SCORERS["random"](seed=1), long, config).kept()[0][0]
    for head in first:
        counts = torch.histc(head.float(), 10, 0, 4000)
        assert counts.min() > 60 and counts.max() < 140  # mean 100
    shared = len(set(first[0].tolist()) & set(other[0].tolist()))
    assert 190 < shared < 310 and not torch.equal(first[0], first[1])

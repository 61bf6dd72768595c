"""Asking a prefilled document, sampling, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apb
import testbed
from apb.context import gather_and_merge, sample


def ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def test_several_queries_over_one_context() -> None:
    """Each answer is the model's own greedy one, whatever was asked before."""
    model = testbed.tiny("qwen2")
    document = ids(50, batch=2)
    context = apb.prefill(model, document, strategy="zigzag", hosts=3)
    for seed, length in ((1, 4), (2, 1), (1, 4)):
        query = ids(length, batch=2, seed=seed)
        prompt = torch.cat([document, query], 1)
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
        assert torch.equal(
            context.generate(query, max_new_tokens=6), expected[:, prompt.shape[1] :]
        )


@pytest.mark.parametrize(("strategy", "busy"), [("apb", 3), ("dense", 1)])
def test_progress_counts_the_layers_of_hosts_that_have_any(strategy: str, busy: int) -> None:
    model, seen = testbed.tiny("llama"), []
    apb.prefill(model, ids(30), strategy=strategy, hosts=3, progress=seen.append)
    total = busy * model.config.num_hidden_layers
    assert seen == pytest.approx([(i + 1) / total for i in range(total)])


def test_dense_leaves_hosts_empty_and_decodes_all_the_same() -> None:
    model = testbed.tiny("llama")
    document, query = ids(20), ids(3, seed=1)
    one = apb.prefill(model, document, strategy="dense", hosts=1)
    many = apb.prefill(model, document, strategy="dense", hosts=4)
    torch.testing.assert_close(one.logits(query), many.logits(query), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_distributed_merge_is_stable(scale: float) -> None:
    """Hosts with lse of +-1e4 and hosts without any key."""
    torch.manual_seed(0)
    outs = [torch.randn(1, 2, 1, 4) for _ in range(4)]
    lses = [torch.full((1, 2, 1), x * scale) for x in (1.0, -1.0, 1.0)]
    lses.append(torch.full((1, 2, 1), -torch.inf))
    outs[3][:] = 0
    merged = apb.VirtualGroup(4).run(lambda h: gather_and_merge(h, outs[h.rank], lses[h.rank]))
    weight = torch.tensor([1.0, torch.tensor(-2 * scale).exp().item(), 1.0, 0.0])
    expected = sum(w * o for w, o in zip(weight / weight.sum(), outs, strict=True))
    for got in merged.values():
        torch.testing.assert_close(got, expected)


def test_a_query_longer_than_the_anchor() -> None:
    model = testbed.tiny("llama")
    context = apb.prefill(model, ids(40), hosts=4, query=ids(30, seed=1), anchor_length=2)
    assert context.plan.anchors == (32, 32, 32, 32)  # host 0 scores its keys by the query as well
    assert context.logits(ids(30, seed=1)).isfinite().all()


def test_stop_ids_end_a_row_and_the_first_token_counts() -> None:
    model = testbed.tiny("llama")
    context = apb.prefill(model, ids(20, batch=2), hosts=2)
    query = ids(3, batch=2, seed=1)
    free = context.generate(query, max_new_tokens=5)
    stop = int(free[0, 0])
    stopped = context.generate(query, max_new_tokens=5, stop_ids=(stop,))
    assert (stopped[0] == stop).all()
    assert torch.equal(context.generate(query, max_new_tokens=1), free[:, :1])


def test_sampling_follows_the_seed_and_top_p() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, -3.0]]).expand(500, -1)
    drawn = sample(logits, 1.0, 0.8, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {1, 2}
    again = sample(logits, 1.0, 0.8, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert set(sample(logits, 1.0, 0.01, torch.Generator()).flatten().tolist()) == {1}


def test_the_model_is_left_as_it_was() -> None:
    model = testbed.tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="at least one document token each"):
        apb.prefill(model, ids(3), hosts=4)
    apb.prefill(model, ids(30), hosts=4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "starr"}, "strategy must be one of dense, ring"),
        ({"compressor": "best"}, "compressor must be one of query-attention"),
        ({"compressor": "query-attention"}, "scores keys by the query"),
        ({"anchor_length": 11}, "longer than the first block of 10"),
        ({"strategy": "ring", "anchor_length": 2}, "ring has no anchor_length"),
        ({"strategy": "star", "compressor": "random"}, "star has no compressor"),
        ({"width": 2}, "apb has no width"),
        ({"query": torch.ones(2, 3, dtype=torch.long)}, "one batch size, got 2 and 1"),
        ({"query": torch.ones(1, 3)}, "query must be int64 token ids"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apb.prefill(testbed.tiny("llama"), ids(40), **{"hosts": 4, **options})


def test_windows_training_and_changing_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match="sliding windows and custom masks are not supported"):
        apb.prefill(testbed.tiny("mistral", sliding_window=8), ids(40))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        apb.prefill(testbed.tiny("llama").train(), ids(40))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = testbed.tiny("llama", rope_parameters=rope, max_position_embeddings=32)
    with pytest.raises(ValueError, match="dynamic rotary embeddings change beyond 32"):
        apb.prefill(model, ids(40))


@pytest.mark.parametrize("kind", ["qkv", "hidden"])
def test_locret_heads_choose_what_travels(kind: str) -> None:
    heads = pytest.importorskip("locret").RetainingHeads
    model = testbed.tiny("llama")
    torch.manual_seed(0)
    compressor = apb.LocretHeads(heads.for_model(model, hidden=8, input=kind))
    document, query = ids(40), ids(3, seed=1)
    trained = apb.prefill(model, document, hosts=4, compressor=compressor)
    none = apb.prefill(model, document, hosts=4, compressor="none")
    assert (trained.logits(query) - none.logits(query)).abs().max() > 1e-6
    everything = apb.prefill(
        model, document, hosts=4, compressor=compressor, anchor_length=0, passing_length=40
    )
    dense = apb.prefill(model, document, hosts=1, strategy="dense")
    torch.testing.assert_close(everything.logits(query), dense.logits(query), rtol=0, atol=1e-4)


def test_locret_heads_of_another_model_are_refused() -> None:
    heads = pytest.importorskip("locret").RetainingHeads
    compressor = apb.LocretHeads(heads.for_model(testbed.tiny("qwen3", num_hidden_layers=3)))
    with pytest.raises(ValueError, match="heads are for a model with layers 3, this one has"):
        apb.prefill(testbed.tiny("llama"), ids(40), hosts=4, compressor=compressor)

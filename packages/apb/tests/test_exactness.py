"""Whole models: exact strategies are the model's own forward, APB and Star meet at their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apb
import testbed
from apb.plan import Shape
from apb.registry import make_strategy

EXACT = ["dense", "ring", "zigzag", "ulysses"]


def ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def own_logits(model, document: Tensor, query: Tensor) -> Tensor:
    with torch.no_grad():
        return model(torch.cat([document, query], 1)).logits[:, document.shape[1] :]


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 8])
def test_exact_strategies_are_the_models_own_forward(strategy: str, hosts: int) -> None:
    model = testbed.tiny("llama-gqa3")
    document, query = ids(83, batch=2), ids(5, batch=2, seed=1)
    context = apb.prefill(model, document, strategy=strategy, hosts=hosts)
    expected = own_logits(model, document, query)
    torch.testing.assert_close(context.logits(query), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arch", ["llama", "llama-mha", "llama-mqa", "qwen2", "qwen3", "mistral", "phi3", "minicpm4"]
)
def test_every_architecture(arch: str) -> None:
    if arch not in testbed.tiny_archs():
        pytest.skip(f"{arch} is not installed")
    model = testbed.tiny(arch)
    document, query = ids(61), ids(4, seed=1)
    expected = own_logits(model, document, query)
    for strategy in ("zigzag", "ulysses"):
        context = apb.prefill(model, document, strategy=strategy, hosts=3)
        torch.testing.assert_close(context.logits(query), expected, rtol=0, atol=1e-5)
    passing_all = apb.prefill(
        model, document, hosts=4, compressor="key-norm", anchor_length=0, passing_length=61
    )
    torch.testing.assert_close(passing_all.logits(query), expected, rtol=0, atol=1e-4)
    approximate = apb.prefill(model, document, hosts=4, query=query)
    assert (approximate.logits(query) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("hosts", [2, 3, 8])
@pytest.mark.parametrize("strategy", ["apb", "spava"])
def test_passing_everything_without_an_anchor_is_dense(strategy: str, hosts: int) -> None:
    model = testbed.tiny("llama")
    document, query = ids(67, batch=2), ids(3, batch=2, seed=1)
    context = apb.prefill(
        model, document, strategy=strategy, hosts=hosts, compressor="random",
        anchor_length=0, passing_length=67,
    )  # fmt: skip
    expected = own_logits(model, document, query)
    torch.testing.assert_close(context.logits(query), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_passing_nothing_with_a_whole_block_as_anchor_is_star(hosts: int) -> None:
    model = testbed.tiny("llama")
    document, query = ids(67), ids(3, seed=1)
    longest = -(-67 // hosts)
    star = apb.prefill(model, document, strategy="star", hosts=hosts)
    ours = apb.prefill(
        model, document, hosts=hosts, compressor="none", anchor_length=longest
    )  # fmt: skip
    torch.testing.assert_close(ours.logits(query), star.logits(query), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("compressor", "query"),
    [
        ("query-attention", 9),
        *((c, n) for c in ("key-norm", "key-difference", "random", "none") for n in (0, 9)),
    ],
)
def test_one_layer_is_the_reference(compressor: str, query: int) -> None:
    """A single attention call on virtual hosts against `apb_prefill`, which makes the mask."""
    tokens, hosts = 71, 4
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, query + tokens, 16) for h in (6, 2, 2))
    chosen = apb.make_compressor(compressor) or apb.NoPassing()
    config = apb.APBConfig(hosts=hosts, pool_kernel=3)
    expected = apb.apb_prefill(q, k, v, config, compressor=chosen, query_length=query)
    strategy = make_strategy("apb", compressor, pool_kernel=3)
    plan = strategy.plan(tokens, hosts, query)
    shape = Shape(batch=2, heads=6, kv_heads=2, head_dim=16)

    def program(host):
        from apb.plan import Layer

        rows = list(range(plan.anchors[host.rank]))
        for block in plan.blocks[host.rank]:
            rows += range(query + block.start, query + block.end)
        layer = Layer(0, host, plan, tuple(x[:, :, rows] for x in (q, k, v)), 0.25)
        out = strategy.attend(layer)
        assert layer.pairs == strategy.pairs(plan, host.rank, shape)
        assert host.bytes_sent == 4 * strategy.values_sent(plan, host.rank, shape)
        return out[:, :, plan.anchors[host.rank] :]

    outs = apb.VirtualGroup(hosts).run(program)
    got = torch.cat([outs[r] for r in range(hosts)], 2)
    torch.testing.assert_close(got, expected.out[:, :, query:], rtol=0, atol=1e-5)
    sent = [strategy.values_sent(plan, r, shape) * 4 for r in range(hosts)]
    assert tuple(sent) == expected.bytes_passed


@pytest.mark.parametrize("strategy", [*EXACT, "star", "apb", "spava"])
@pytest.mark.parametrize("hosts", [1, 2, 5])
def test_bytes_and_pairs_are_the_closed_form(strategy: str, hosts: int) -> None:
    model = testbed.tiny("llama-gqa3")
    document = ids(59, batch=2)
    context = apb.prefill(model, document, strategy=strategy, hosts=hosts)
    made = make_strategy(strategy)
    shape = Shape(batch=2, heads=6, kv_heads=2, head_dim=16)
    for rank in range(hosts):
        sent = 2 * 4 * made.values_sent(context.plan, rank, shape)
        assert context.report.bytes_sent[rank] == sent
        pairs = 2 * made.pairs(context.plan, rank, shape)
        assert context.report.pairs.get(rank, 0) == pytest.approx(pairs)
    if strategy in ("apb", "star"):
        assert context.report.bytes_sent[hosts - 1] == 0  # nobody comes after

"""The oracles here are loops over rows and keys in NumPy, sharing no code with the package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from apb import APBConfig, KeyNorm, NoPassing, QueryAttention, Random, apb_prefill
from apb.reference import prefill_mask

HEADS = [(1, 1), (4, 4), (6, 2), (5, 1)]


def _qkv(tokens: int, heads: tuple[int, int], *, batch: int = 2, size: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, h, tokens, size, generator=generator) * 2
        for h in (heads[0], heads[1], heads[1])
    )


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: int, i: int, t: int, seen: list[int]
):
    """Row t of query head i over the token positions `seen`, in float64."""
    head = i // (q.shape[1] // k.shape[1])
    logits = [
        float(q[b, i, t].double() @ k[b, head, s].double()) / math.sqrt(q.shape[3]) for s in seen
    ]
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum() @ v[b, head, seen].double().numpy()


def _ceil_first_blocks(tokens: int, hosts: int) -> list[list[int]]:
    return [piece.tolist() for piece in np.array_split(np.arange(tokens), hosts)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("tokens", "hosts"), [(32, 4), (37, 4), (29, 8), (8, 8), (23, 2)])
@pytest.mark.parametrize("compressor", [Random(), KeyNorm()])
def test_passing_everything_without_anchor_is_dense(tokens, hosts, heads, compressor) -> None:
    q, k, v = _qkv(tokens, heads)
    config = APBConfig(hosts=hosts, anchor_length=0, passing_length=tokens)
    result = apb_prefill(q, k, v, config, compressor=compressor)
    torch.testing.assert_close(result.out, _dense(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("anchor", [1, 3, 5])
def test_passing_everything_with_an_anchor_is_dense_too(anchor: int) -> None:
    # What the anchor holds, the first host keeps at home: no key is seen twice.
    q, k, v = _qkv(20, (4, 2))
    config = APBConfig(hosts=4, anchor_length=anchor, passing_length=5)
    result = apb_prefill(q, k, v, config, compressor=KeyNorm())
    torch.testing.assert_close(result.out, _dense(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [APBConfig(hosts=1), APBConfig(hosts=1, anchor_length=99)])
def test_one_host_is_dense(config: APBConfig) -> None:
    q, k, v = _qkv(19, (6, 2))
    result = apb_prefill(q, k, v, config, compressor=Random())
    torch.testing.assert_close(result.out, _dense(q, k, v), rtol=0, atol=1e-5)
    assert result.bytes_passed == (0,) and len(result.kv) == 1
    assert result.flops == (4 * 8 * 2 * 6 * 19 * 20 // 2,)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize(("tokens", "hosts"), [(12, 3), (14, 4)])
@pytest.mark.parametrize("by", ["no compressor", "no length"])
def test_passing_nothing_with_a_full_anchor_is_star_attention(tokens, hosts, heads, by) -> None:
    q, k, v = _qkv(tokens, heads)
    blocks = _ceil_first_blocks(tokens, hosts)
    nothing = 0 if by == "no length" else None
    config = APBConfig(hosts=hosts, anchor_length=len(blocks[0]), passing_length=nothing)
    compressor = NoPassing() if by == "no compressor" else Random()
    out = apb_prefill(q, k, v, config, compressor=compressor).out
    for block in blocks:
        for t in block:
            # Star attention: the first block and the own block, up to oneself.
            seen = sorted({s for s in blocks[0] + block if s <= t})
            for b in range(2):
                for i in range(heads[0]):
                    expected = _row(q, k, v, b, i, t, seen)
                    np.testing.assert_allclose(out[b, i, t].numpy(), expected, atol=1e-5)


class Scores:
    """A compressor that hands out prepared scores for each host."""

    def __init__(self, scores: list[torch.Tensor]) -> None:
        self.scores, self.asked = scores, []

    def __call__(self, q, k, v, *, query, host):
        self.asked.append((host, q.shape[2], query.shape[2]))
        return self.scores[host]


def _brute_force_selection(scores: list[float], at_home: int, count: int, pool: int) -> list[int]:
    reach = pool // 2
    pooled = [max(scores[max(i - reach, 0) : i + reach + 1]) for i in range(len(scores))]
    best = sorted(range(at_home, len(scores)), key=lambda i: (-pooled[i], i))[:count]
    return sorted(best)


@pytest.mark.parametrize("pool", [1, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
@pytest.mark.parametrize(("query", "anchor"), [(0, 0), (0, 2), (3, 2), (9, 1), (2, 0), (3, 5)])
def test_everything_at_once_against_brute_force(query, anchor, count, pool) -> None:
    document, hosts, heads = 18, 4, (4, 2)
    q, k, v = _qkv(query + document, heads)
    blocks = _ceil_first_blocks(document, hosts)
    generator = torch.Generator().manual_seed(1)
    # Few distinct values, so that ties are the rule.
    scores = [torch.randint(0, 4, (2, 2, len(b)), generator=generator).float() for b in blocks]
    config = APBConfig(hosts=hosts, anchor_length=anchor, passing_length=count, pool_kernel=pool)
    compressor = Scores(scores)
    result = apb_prefill(q, k, v, config, compressor=compressor, query_length=query)
    assert compressor.asked == [(h, len(blocks[h]), query) for h in range(hosts - 1)]

    flops = [0] * hosts
    for b in range(2):
        for i in range(4):
            head = i // 2
            arrived: list[int] = []
            for h, block in enumerate(blocks):
                front = list(range(query + anchor)) if h else []
                for t in front:
                    expected = _row(q, k, v, b, i, t, list(range(t + 1)))
                    np.testing.assert_allclose(result.anchor_out[b, i, t], expected, atol=1e-5)
                    flops[h] += 4 * 8 * (t + 1)
                for t in block:
                    seen = arrived + front + [query + s for s in block if s <= t]
                    assert len(set(seen)) == len(seen)
                    flops[h] += 4 * 8 * len(seen)
                    expected = _row(q, k, v, b, i, query + t, seen)
                    np.testing.assert_allclose(result.out[b, i, query + t], expected, atol=1e-5)
                picked: list[int] = []
                if h < hosts - 1:
                    at_home = 0 if h else anchor
                    picked = [
                        block[0] + s
                        for s in _brute_force_selection(
                            scores[h][b, head].tolist(), at_home, count, pool
                        )
                    ]
                assert result.passed[h][b, head].tolist() == picked
                arrived = arrived + [query + s for s in picked]
    assert result.flops == tuple(flops)
    torch.testing.assert_close(result.out[:, :, :query], result.anchor_out[:, :, :query])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("tokens", [64, 61])
def test_bytes_and_flops_equal_the_closed_forms(
    tokens: int, dtype: torch.dtype, width: int
) -> None:
    batch, hosts, anchor, passing, size = 2, 4, 4, 3, 8
    q, k, v = (x.to(dtype) for x in _qkv(tokens, (6, 2), batch=batch, size=size))
    config = APBConfig(hosts=hosts, anchor_length=anchor, passing_length=passing)
    result = apb_prefill(q, k, v, config, compressor=Random())
    # K and V of l_p tokens of each KV head go to every later host: H(H-1)/2 messages in all.
    message = 2 * batch * 2 * passing * size * width
    assert result.bytes_passed == tuple(message * (hosts - 1 - h) for h in range(hosts))
    assert sum(result.bytes_passed) == message * hosts * (hosts - 1) // 2
    for h in range(hosts):
        l = len(_ceil_first_blocks(tokens, hosts)[h])
        a = anchor if h else 0
        pairs = a * (a + 1) // 2 + l * (h * passing + a) + l * (l + 1) // 2
        assert result.flops[h] == 4 * size * batch * 6 * pairs


def test_nothing_reaches_an_earlier_row() -> None:
    q, k, v = _qkv(26, (4, 2))
    config = APBConfig(hosts=3, anchor_length=4, passing_length=3)
    before = apb_prefill(q, k, v, config, compressor=KeyNorm(), query_length=2).out
    for cut in (5, 10, 17, 18, 25):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, cut:] = torch.randn_like(x[:, :, cut:])
        # The selection may look ahead within a block, but its keys only go to later hosts.
        after = apb_prefill(*later, config, compressor=KeyNorm(), query_length=2).out
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


def test_low_precision_inputs_are_computed_in_float32_and_inputs_left_alone() -> None:
    q, k, v = (x.bfloat16() for x in _qkv(21, (4, 2)))
    copies = [x.clone() for x in (q, k, v)]
    config = APBConfig(hosts=3, passing_length=2)
    result = apb_prefill(q, k, v, config, compressor=QueryAttention(), query_length=3)
    exact = apb_prefill(
        q.float(), k.float(), v.float(), config, compressor=QueryAttention(), query_length=3
    )
    assert result.out.dtype == torch.bfloat16 and result.kv[0][0].dtype == torch.bfloat16
    assert torch.equal(result.out, exact.out.bfloat16())
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


def test_non_contiguous_inputs() -> None:
    q, k, v = _qkv(22, (4, 2))
    config = APBConfig(hosts=4)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    expected = apb_prefill(q, k, v, config, compressor=KeyNorm()).out
    torch.testing.assert_close(apb_prefill(*strided, config, compressor=KeyNorm()).out, expected)


def test_mask_by_hand() -> None:
    rows = ["001000", "001100", "111110", "111111"]
    assert prefill_mask(2, 2, 2).tolist() == [[c == "1" for c in row] for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1, 2, 11, 4)}, "k and v must have one shape"),
        ({"q": torch.ones(1, 4, 11, 4)}, "same tokens, got 11 in q and 12 in k"),
        ({"q": torch.ones(1, 3, 12, 4)}, "multiple of KV heads, got 3 and 2"),
        ({"q": torch.ones(2, 4, 12, 4)}, "agree in batch and head size"),
        ({"q": torch.ones(4, 12, 4)}, r"q must be a floating-point tensor .* got \(4, 12, 4\)"),
        ({"q": torch.ones(1, 4, 12, 4).long()}, "q must be a floating-point .* torch.int64"),
        ({"q": torch.ones(1, 4, 12, 4).half()}, "share dtype and device"),
        ({"query_length": 12}, "query_length must leave document tokens: expected 0 to 11"),
        ({"query_length": -1}, "query_length must leave .* got -1"),
        ({"query_length": 10}, "hosts=3 needs at least one document token each, got 2"),
        ({"query_length": 1, "config": APBConfig(hosts=1)}, "query_length=1 needs hosts >= 2"),
        ({"config": APBConfig(hosts=3, anchor_length=5)}, "anchor_length=5 is longer"),
        ({"compressor": lambda *_, **__: torch.zeros(1, 2, 3)}, r"\(1, 2, 4\).* got \(1, 2, 3\)"),
        ({"compressor": lambda *_, **__: torch.full((1, 2, 4), torch.nan)}, "with NaN; correct"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    kv = torch.ones(1, 2, 12, 4)
    call = {
        "q": torch.ones(1, 4, 12, 4),
        "k": kv,
        "v": kv,
        "config": APBConfig(hosts=3),
        "compressor": Random(),
    } | change
    with pytest.raises(ValueError, match=message):
        apb_prefill(**call)

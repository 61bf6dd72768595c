from __future__ import annotations

import pytest
import torch

from apb import KeyDifference, KeyNorm, NoPassing, QueryAttention, Random


def _block(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, query = (
        torch.randn(2, h, n, 5, generator=generator) for h, n in ((6, 9), (2, 9), (2, 9), (6, 3))
    )
    return q, k, v, query


def test_query_attention_is_the_mean_logit() -> None:
    q, k, v, query = _block()
    scores = QueryAttention()(q, k, v, query=query, host=0)
    for b in range(2):
        for head in range(2):
            for token in range(9):
                logits = [
                    float(query[b, i, m] @ k[b, head, token]) / 5**0.5
                    for i in range(6)
                    if i // 3 == head
                    for m in range(3)
                ]
                assert float(scores[b, head, token]) == pytest.approx(sum(logits) / 9, abs=1e-5)


def test_query_attention_needs_a_query() -> None:
    q, k, v, query = _block()
    with pytest.raises(ValueError, match="query_length is 0.*query_length >= 1"):
        QueryAttention()(q, k, v, query=query[:, :, :0], host=0)


def test_key_norm_prefers_small_keys() -> None:
    q, k, v, query = _block()
    k[1, 0, 4] = 0.01
    scores = KeyNorm()(q, k, v, query=query, host=0)
    assert int(scores[1, 0].argmax()) == 4
    torch.testing.assert_close(scores, -(k**2).sum(-1).sqrt())


def test_key_difference_prefers_keys_unlike_the_rest() -> None:
    q, k, v, query = _block()
    scores = KeyDifference()(q, k, v, query=query, host=0)
    for b, head in ((0, 0), (1, 1)):
        unit = [key / key.norm() for key in k[b, head]]
        mean = sum(unit) / len(unit)
        wanted = [-float(key @ mean / mean.norm()) for key in unit]
        assert scores[b, head].tolist() == pytest.approx(wanted, abs=1e-6)
    same = torch.ones(1, 1, 9, 5)
    same[0, 0, 4] = -1.0
    assert int(KeyDifference()(same, same, same, query=same, host=0).argmax()) == 4


def test_random_depends_on_seed_and_host_alone() -> None:
    q, k, v, query = _block()
    draw = {
        (seed, host): Random(seed)(q, k, v, query=query, host=host)
        for seed in (0, 1)
        for host in (0, 1)
    }
    assert torch.equal(draw[0, 0], Random()(q * 2, k * 2, v, query=query, host=0))
    assert len({tuple(scores.flatten().tolist()) for scores in draw.values()}) == 4


@pytest.mark.parametrize("seed", [-1, 2**40, 1.5, True])
def test_random_refuses_a_bad_seed(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        Random(seed)


def test_no_passing() -> None:
    q, k, v, query = _block()
    assert NoPassing()(q, k, v, query=query, host=3) is None

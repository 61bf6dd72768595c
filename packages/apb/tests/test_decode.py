from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from apb import APBConfig, NoPassing, apb_prefill, distributed_decode


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("sizes", [[9], [4, 5], [0, 3, 0, 7], [5, 0], [0, 0, 1]])
def test_one_token_attends_to_every_host(heads: tuple[int, int], sizes: list[int]) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 8)
        for h, n in ((heads[0], 1), (heads[1], sum(sizes)), (heads[1], sum(sizes)))
    )
    hosts = list(zip(k.split(sizes, 2), v.split(sizes, 2), strict=True))
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(distributed_decode(q, hosts), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [3, 7])
def test_several_new_tokens_are_causal_on_the_last_host(last: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 3, 8),
        torch.randn(1, 2, 12 + last, 8),
        torch.randn(1, 2, 12 + last, 8),
    )
    hosts = list(zip(k.split([6, 6, last], 2), v.split([6, 6, last], 2), strict=True))
    out = distributed_decode(q, hosts)
    for row in range(3):
        upto = 12 + last - 2 + row
        expected = scaled_dot_product_attention(
            q[:, :, row : row + 1], k[:, :, :upto], v[:, :, :upto], enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, row : row + 1], expected, rtol=0, atol=1e-5)


def test_decode_over_a_prefill_reads_the_whole_document_once() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 33, 8), torch.randn(1, 2, 33, 8), torch.randn(1, 2, 33, 8)
    result = apb_prefill(q, k, v, APBConfig(hosts=4), compressor=NoPassing(), query_length=2)
    new = torch.randn(1, 4, 1, 8)
    # The anchor's copy of the query is dropped after prefill.
    expected = scaled_dot_product_attention(new, k[:, :, 2:], v[:, :, 2:], enable_gqa=True)
    torch.testing.assert_close(distributed_decode(new, result.kv), expected, rtol=0, atol=1e-5)


def test_huge_logits_stay_finite() -> None:
    q, k = torch.full((1, 1, 1, 4), 100.0), torch.full((1, 1, 6, 4), 50.0)
    k[:, :, 3:] = -50.0
    v = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 4).contiguous()
    # Logits are +10000 on host 0 and -10000 on host 1: the mean of values 0, 1, 2.
    out = distributed_decode(q, [(k[:, :, :3], v[:, :, :3]), (k[:, :, 3:], v[:, :, 3:])])
    torch.testing.assert_close(out, torch.ones(1, 1, 1, 4))


def _kv(tokens: int, heads: int = 2):
    return torch.ones(1, heads, tokens, 4), torch.ones(1, heads, tokens, 4)


@pytest.mark.parametrize(
    ("rows", "hosts", "message"),
    [
        (1, [], "kv_per_host holds no key"),
        (1, [_kv(0), _kv(0)], "kv_per_host holds no key"),
        (3, [_kv(5), _kv(2)], r"kv_per_host\[1\] holds 2 tokens and q has 3 rows; append"),
        (1, [_kv(5), _kv(5, heads=3)], r"kv_per_host\[1\]: query heads must be a multiple"),
        (1, [(torch.ones(5, 4), torch.ones(5, 4))], r"kv_per_host\[0\]: k must be a floating"),
    ],
)
def test_errors(rows: int, hosts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed_decode(torch.ones(1, 4, rows, 4), hosts)

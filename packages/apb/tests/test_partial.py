from __future__ import annotations

import pytest
import torch

from apb.merge import merge_lse
from apb.partial import _eager, merge_two, partial_attention
from apb.reference import masked_attention


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    ("rows", "keys", "causal"),
    [(33, 5, False), (1, 130, False), *((n, n, c) for n in (1, 7, 601) for c in (False, True))],
)
def test_against_the_masked_reference(heads, rows, keys, causal) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, rows, heads[0], 8).transpose(1, 2)  # not contiguous
    k, v = (torch.randn(2, keys, heads[1], 8).transpose(1, 2) for _ in range(2))
    mask = torch.ones(rows, keys, dtype=torch.bool)
    expected = masked_attention(q, k, v, mask.tril() if causal else mask)
    torch.testing.assert_close(partial_attention(q, k, v, causal=causal), expected)
    many = tuple(x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    torch.testing.assert_close(_eager(q, *many, causal, 8**-0.5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 20, 16, dtype=dtype) for _ in range(3))
    out, lse = partial_attention(q, k, v, causal=True)
    wide = tuple(x.double() for x in (q, k, v))
    expected, _ = masked_attention(*wide, torch.ones(20, 20, dtype=torch.bool).tril())
    assert out.dtype == dtype and lse.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)


def test_no_keys() -> None:
    out, lse = partial_attention(
        torch.randn(1, 2, 3, 4), torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4)
    )
    assert not out.any() and bool((lse == -torch.inf).all())
    other = torch.randn(1, 2, 3, 4)
    merged, merged_lse = merge_two(out, lse, other, torch.zeros(1, 2, 3))
    assert torch.equal(merged, other) and not merged_lse.any()


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_merge_two_is_merge_lse(shift: float) -> None:
    torch.manual_seed(0)
    outs = [torch.randn(1, 2, 3, 4) for _ in range(2)]
    lses = [torch.randn(1, 2, 3) + shift, torch.randn(1, 2, 3) + shift]
    torch.testing.assert_close(merge_two(outs[0], lses[0], outs[1], lses[1]), merge_lse(outs, lses))


def test_a_triangle_must_be_square() -> None:
    with pytest.raises(ValueError, match="as many rows as keys, got 2 and 3"):
        partial_attention(*(torch.ones(1, 1, n, 4) for n in (2, 3, 3)), causal=True)

from __future__ import annotations

import pytest
import torch

from locret.attention import attend


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("new, held", [(1, 9), (2, 3), (7, 40), (33, 34), (12, 12)])
def test_two_parts_are_one_softmax(heads: int, kv_heads: int, new: int, held: int) -> None:
    torch.manual_seed(new)
    q = torch.randn(2, heads, new, 16) * 3
    k, v = (torch.randn(2, kv_heads, held + 5, 16)[:, :, :held] for _ in range(2))
    k[0, 0, 0] *= 20  # one part far outweighs the other
    out = attend(q, k, v, None, 0.3)
    wide_k, wide_v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    logits = q.double() @ wide_k.transpose(2, 3) * 0.3
    at = torch.arange(held)
    logits.masked_fill_(at[None] > held - new + torch.arange(new)[:, None], -torch.inf)
    assert (out - logits.softmax(-1) @ wide_v).abs().max() < 1e-5
    seen = (at[None] <= held - new + torch.arange(new)[:, None])[None, None]
    assert (out - attend(q, k, v, seen, 0.3)).abs().max() < 1e-5
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.3)
    assert half.dtype == torch.bfloat16 and (half - out).abs().mean() < 0.05


@pytest.mark.parametrize("new", [1, 3])
def test_bias_is_of_the_older_entries(new: int) -> None:
    """An entry that stands for two is as two of it; −∞ is as if it were not there."""
    torch.manual_seed(new)
    q, k, v = torch.randn(1, 6, new, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    bias = torch.zeros(1, 2, 9 - new)
    bias[..., 0], bias[..., 2] = -torch.inf, torch.tensor(2.0).log()
    twice = [torch.cat([x[:, :, 1:3], x[:, :, 2:]], 2) for x in (k, v)]
    assert (attend(q, k, v, None, 0.3, bias) - attend(q, *twice, None, 0.3)).abs().max() < 1e-6

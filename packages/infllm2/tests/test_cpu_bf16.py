"""bfloat16 attention of many rows in C++: late and large logits, threads, odd keys."""

from __future__ import annotations

import pytest
import torch
from test_cpu import plain_attention
from torch import Tensor

from infllm2 import backends, reference
from infllm2.backends.cpu_library import kernels

LIBRARY, REASON = kernels()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=REASON)


def tensors(heads: int, kv_heads: int, T: int, S: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(S + D)
    return tuple(
        torch.randn(1, h, n, D, generator=generator).bfloat16()
        for h, n in ((heads, T), (kv_heads, S), (kv_heads, S))
    )


def all_blocks(kv_heads: int, T: int, S: int, block_size: int) -> Tensor:
    return torch.arange(-(-S // block_size), dtype=torch.int32).expand(1, kv_heads, T, -1)


@pytest.mark.parametrize("growth", [-40.0, 0.0, 3.0, 40.0, 400.0])
@pytest.mark.parametrize(("G", "T", "D"), [(16, 70, 128), (3, 391, 40), (1, 33, 80), (20, 130, 2)])
def test_logits_that_grow_along_the_keys(G: int, T: int, D: int, growth: float) -> None:
    """The largest logit of a row comes early, late, or leaves all others far behind."""
    S = 391
    q, k, v = tensors(G, 1, T, S, D)
    # A direction that all queries share, and along which keys grow (or shrink).
    q[..., 0] = 1.0
    k[..., 0] = torch.linspace(0, growth * D**0.5, S).bfloat16()
    blocks, sizes = all_blocks(1, T, S, 16), {"block_size": 16, "scale": D**-0.5}
    truth, truth_lse = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), blocks, **sizes
    )
    plain, _ = plain_attention(q, k, v, blocks, **sizes)
    allowed = max(2 * float((plain - truth).abs().max()), 8e-3)  # a rounding of numbers up to 4
    cpu = backends.get("cpu")
    out, lse = cpu.attend(q, k, v, blocks, **sizes)
    assert float((out - truth).abs().max()) <= allowed
    assert float((cpu.dense(q, k, v, D**-0.5) - truth).abs().max()) <= allowed
    torch.testing.assert_close(lse, truth_lse.float(), atol=5e-3, rtol=1e-5)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    """Nor on how many tokens are a unit of work."""
    q, k, v = tensors(9, 3, 200, 500, 64)
    listed = torch.stack([torch.randperm(8)[:4].sort().values for _ in range(600)])
    listed = listed.int().view(1, 3, 200, 4)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            cpu = backends.get("cpu")
            found.append(
                (cpu.dense(q, k, v, 0.2), *cpu.attend(q, k, v, listed, block_size=64, scale=0.2))
            )
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_spoils_only_those_who_see_it(value: float) -> None:
    q, k, v = tensors(8, 1, 300, 300, 64)
    cpu = backends.get("cpu")
    whole = cpu.dense(q, k, v, 0.125)
    k[0, 0, 200, 3] = value
    spoilt = cpu.dense(q, k, v, 0.125)
    assert torch.equal(whole[:, :, :200], spoilt[:, :, :200])
    if value != value:
        assert spoilt[:, :, 200:].isnan().all()
    else:  # where the logit is +inf
        seen = (q[:, :, 200:, 3].sign() * value) > 0
        assert spoilt[:, :, 200:][seen].isnan().all()
        assert spoilt[:, :, 200:][~seen & (q[:, :, 200:, 3] != 0)].isfinite().all()

"""More checks of the Triton kernels, as triton_checks.py: what is rare, and what PyTorch asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from triton_checks import TOLERANCE, Case, small_launches

from infllm2 import InfLLMv2Config, backends, reference
from infllm2.compression import compress_keys


def everything(
    q: Tensor, k: Tensor, v: Tensor, config: InfLLMv2Config
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Blocks, output, log-sum-exp and gradients."""
    triton = backends.get("triton")
    blocks = triton.select(q, *compress_keys(k, config), k.shape[2], config)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = triton.attend(*leaves, blocks, block_size=config.block_size, scale=0.3)
    (out.float().sin().sum() + lse.sum()).backward()
    return blocks, out.detach(), lse.detach(), [x.grad for x in leaves]


def chunks(device: str) -> None:
    """The sets of a token do not depend on how its prompt was cut."""
    for lse, S, cuts in (
        ("exact", 150, ((1, (1, 40, 149)), (17, (17, 136, 150)))),
        ("approx", 530, ((1, (97, 530)), (17, (476,)), (512, (512, 530)))),
    ):
        case = Case(S, S, 1, 16, K=1, config={"lse": lse})
        q, k, _ = case.tensors(device)
        config = case.settings()
        select = backends.get("triton").select
        whole = select(q, *compress_keys(k, config), S, config)
        for chunk, ends in cuts:
            for end in ends:
                first = max(0, end - chunk)
                seen = compress_keys(k[:, :, :end], config)
                part = select(q[:, :, first:end], *seen, end, config)
                assert torch.equal(part, whole[:, :, first:end]), (lse, chunk, end)


def ties(device: str) -> None:
    """Where all scores are equal, the lowest blocks win, in one chunk of scores or in many."""
    case = Case(300, 9, 3, 16, K=1, config={"topk": 5})
    q, k, _ = case.tensors(device)
    config = case.settings()
    keys = compress_keys(k, config)
    for zero in ((q * 0, *keys), (q, *(x * 0 for x in keys))):
        expected = reference.select_blocks(*zero, 300, config)
        for chunk in (8, 1 << 13):
            with small_launches(chunk=chunk):
                assert torch.equal(backends.get("triton").select(*zero, 300, config), expected)


def not_finite(device: str) -> None:
    """Keys that are not finite: sets as the reference's, and exactly the rows that see them are
    spoilt."""
    case = Case(200, 60, 3, 16, K=1)
    config = case.settings()
    for value in (float("nan"), float("inf"), -float("inf")):
        q, k, v = case.tensors(device)
        k[:, :, 37, 3] = value
        k[:, :, 190, 5] = value
        keys = compress_keys(k, config)
        blocks = reference.select_blocks(q, *keys, 200, config)
        assert torch.equal(backends.get("triton").select(q, *keys, 200, config), blocks)
        for queries in (60, 1):  # prefill, and in parts
            part = (q[:, :, -queries:], k, v, blocks[:, :, -queries:])
            expected = reference.block_sparse_attention(*part, block_size=16, scale=0.3)
            with small_launches(programs=1 if queries > 1 else 128, scratch=1 << 20):
                got = backends.get("triton").attend(*part, block_size=16, scale=0.3)
            for mine, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Memory comes full of NaN and 99."""
    empty, like = torch.empty, torch.empty_like

    def fill(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else 99)

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: fill(like(*a, **k))),
    ):
        yield


def written_whole(device: str) -> None:
    """Nothing is left of what was in memory before, and results are the same bit for bit."""
    for case, programs in ((Case(120, 29, 3, 24, B=2), 1), (Case(150, 2, 3, 24), 128)):
        q, k, v = case.tensors(device)
        with small_launches(programs=programs, chunk=1 << 13):
            clean = everything(q, k, v, case.settings())
            with poison():
                again = everything(q, k, v, case.settings())
        for one, other in zip([*clean[:3], *clean[3]], [*again[:3], *again[3]], strict=True):
            assert one.isfinite().all() and torch.equal(one, other)


def nothing_to_do(device: str) -> None:
    """No query, no row, no listed block, or only blocks that lie after the query."""
    triton = backends.get("triton")
    config = Case(64, 4, 2, 16).settings()
    q, k, v = Case(64, 4, 2, 16).tensors(device)
    for part in (slice(0), slice(4)):
        rows = [x[: 0 if part.stop else 1] for x in (q[:, :, part], k, v)]
        blocks, out, lse, grads = everything(*rows, config)
        assert out.shape == rows[0].shape and lse.shape == out.shape[:3] and blocks.numel() == 0
        assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, rows, strict=True))
    late = torch.tensor([[-1, -1], [3, -1], [1, 3], [0, 2]], device=device).expand(1, 2, 4, 2)
    q, k, v = (x[:, :, :n] for x, n in ((q, 4), (k, 36), (v, 36)))  # positions 32 … 35, block 2
    for blocks in (late[..., :0], late, late.int()):
        for programs in (1, 128):
            with small_launches(programs=programs, scratch=1 << 20):
                leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
                out, lse = triton.attend(*leaves, blocks, block_size=16, scale=0.3)
                out.sum().backward()
            safe = blocks.masked_fill(blocks > 2, -1)
            expected = reference.block_sparse_attention(q, k, v, safe, block_size=16, scale=0.3)
            torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)
            assert all(x.grad.isfinite().all() for x in leaves)
            blind = (safe < 0).all(-1).repeat_interleave(2, 1)
            assert not leaves[0].grad[blind].any()


def as_pytorch_asks(device: str) -> None:
    """Schema, fake tensors and autograd registration; and a graph without breaks."""
    triton = backends.get("triton")
    case = Case(50, 3, 2, 16, K=1)
    q, k, v = case.tensors(device)
    config = case.settings()
    keys = compress_keys(k, config)
    blocks = triton.select(q, *keys, 50, config)
    ops = torch.ops.infllm2
    sizes = (50, 8, 4, 16, 1, 2, 3, False)
    torch.library.opcheck(ops.triton_select, (q, *keys, *sizes))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.triton_attend, (*leaves, blocks, 16, 0.3))
    out, lse = triton.attend(q, k, v, blocks, block_size=16, scale=0.3)
    torch.library.opcheck(
        ops.triton_attend_backward, (q, k, v, blocks, out, lse, out, lse, 16, 0.3)
    )

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = triton.select(q.detach(), *keys, 50, config)
        return triton.attend(q, k, v, blocks, block_size=16, scale=0.3)[0].sin()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(both(*leaves).sum(), leaves)
    for mine, theirs in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def length_on_the_gpu(device: str) -> None:
    """Decoding in launches that do not know how many keys there are: as by those that do."""
    for case in (
        Case(250, 1, 3, 16, B=2),
        Case(250, 1, 8, 64, K=1, dtype=torch.bfloat16),
        Case(250, 1, 1, 16, config={"lse": "exact"}),
    ):
        q, k, v = case.tensors(device)
        config, triton = case.settings(), backends.get("triton")
        for length in (5, 79, 130, 250):
            keys = torch.tensor([length], device=device)
            compressed = compress_keys(k[:, :, :length], config)
            wanted = triton.select(q, *compressed, length, config)
            wanted, _ = triton.attend(
                q, k[:, :, :length], v[:, :, :length], wanted,
                block_size=config.block_size, scale=case.D**-0.5,
            )  # fmt: skip
            room = [torch.full_like(x, float("nan")) for x in (k, v, *compress_keys(k, config))]
            for whole, part in zip(room, (k, v, *compressed), strict=True):
                n = min(length, part.shape[2])
                whole[:, :, :n] = part[:, :, :n]
            got = triton.decode(q, *room, keys, config)
            torch.testing.assert_close(got, wanted, atol=TOLERANCE[case.dtype], rtol=1e-5)

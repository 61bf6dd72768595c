"""The C++ kernels against the reference: random shapes, every level, threads, strides."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infllm2 import InfLLMv2Config, backends, reference
from infllm2.backends.cpu_backend import _Attend
from infllm2.backends.cpu_library import LEVELS, kernels
from infllm2.compression import _means, compress_keys

LIBRARY, REASON = kernels()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=REASON)
# Of results of order one: a few rounding steps of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, InfLLMv2Config]:
    """q, k, v and a configuration of random sizes; q is a strided view half of the time."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    S = draw(st.integers(1, 400))
    T = draw(st.sampled_from([1, 2, 7, S // 2, S])) if S > 7 else S
    K, G = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 40]))
    B, D = draw(st.integers(1, 2)), draw(st.sampled_from([2, 16, 40, 64, 128]))
    block = draw(st.sampled_from([8, 16, 64, 72]))
    topk = draw(st.integers(1, 5))
    config = InfLLMv2Config(
        kernel_size=8,
        kernel_stride=draw(st.sampled_from([2, 4, 8])),
        block_size=block,
        init_blocks=draw(st.integers(0, topk)),
        window_size=block * draw(st.integers(1, 3)),
        topk=topk,
        dense_len=-1,
        lse=draw(st.sampled_from(["approx", "exact"])),
    )

    def tensor(heads: int, length: int) -> Tensor:
        if draw(st.booleans()):  # [B, length, heads, D] in memory, as transformers often has it
            x = torch.randn(B, length, heads, D, generator=generator).transpose(1, 2)
        else:
            x = torch.randn(B, heads, length, D, generator=generator)
        return x.to(dtype)

    return tensor(K * G, T), tensor(K, S), tensor(K, S), config


def check(q: Tensor, k: Tensor, v: Tensor, config: InfLLMv2Config) -> None:
    """Selection, attention over the reference's sets, both in one, and dense attention."""
    cpu = backends.get("cpu")
    S, D = k.shape[2:]
    scale = D**-0.5
    keys = compress_keys(k, config)
    wide = [x.double() for x in (q, *keys)]
    scores = reference.block_scores(*wide, S, config)
    expected = reference.select_blocks(*wide, S, config)
    got = cpu.select(q, *keys, S, config)
    assert_equal_but_for_ties(got, expected, scores)
    truth, truth_lse = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), got, block_size=config.block_size, scale=scale
    )
    out, lse = cpu.attend(q, k, v, got, block_size=config.block_size, scale=scale)
    plain, _ = reference.block_sparse_attention(
        q, k, v, got, block_size=config.block_size, scale=scale
    )
    allowed = max(2 * float((plain - truth).abs().max()), TOLERANCE[q.dtype] / 10)
    assert float((out - truth).abs().max()) <= allowed
    torch.testing.assert_close(lse, truth_lse.float(), atol=TOLERANCE[q.dtype], rtol=1e-4)
    both, blocks = cpu.run(q, k, v, *keys, config, scale)
    assert torch.equal(blocks, got)
    torch.testing.assert_close(both, out, atol=TOLERANCE[q.dtype], rtol=0)
    everything = torch.arange(-(-S // config.block_size), dtype=torch.int32)
    everything = everything.expand(*got.shape[:3], -1)
    full, _ = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), everything, block_size=config.block_size, scale=scale
    )
    plain, _ = plain_attention(q, k, v, everything, block_size=config.block_size, scale=scale)
    allowed = max(2 * float((plain - full).abs().max()), TOLERANCE[q.dtype] / 5)
    dense = cpu.dense(q, k, v, scale)
    assert float((dense - full).abs().max()) <= allowed
    check_gradients(q, k, v, got, config.block_size, scale)
    check_gradients(q, k, v, None, config.block_size, scale)


def check_gradients(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block_size: int, scale: float
) -> None:
    """Over listed blocks, or dense for `None`: at most twice as far from the truth as PyTorch."""
    everything = torch.arange(-(-k.shape[2] // block_size), dtype=torch.int32)
    listed = everything.expand(*k.shape[:2], q.shape[2], -1) if blocks is None else blocks
    weight = torch.linspace(-1, 1, q.numel()).view_as(q)

    def gradients(inputs: list[Tensor], attend: Callable[..., tuple[Tensor, Tensor]]) -> list:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, listed, block_size=block_size, scale=scale)
        (out.to(weight.dtype) * weight).sum().add(lse.sum()).backward()
        return [x.grad.double() for x in leaves]

    def ours(q: Tensor, k: Tensor, v: Tensor, listed: Tensor, **sizes: Any) -> Any:
        if blocks is not None:
            return backends.get("cpu").attend(q, k, v, listed, **sizes)
        return _Attend.apply(q, k, v, None, 64, scale)

    mine, plain = gradients([q, k, v], ours), gradients([q, k, v], plain_attention)
    weight = weight.double()
    truth = gradients([q.double(), k.double(), v.double()], reference.block_sparse_attention)
    for name, x, theirs, exact in zip("qkv", mine, plain, truth, strict=True):
        # One rounding of the result; float32 sums over all rows, whose errors walk randomly.
        walk = max(32, (q.shape[1] // k.shape[1] * q.shape[2]) ** 0.5)
        step = max(2 * torch.finfo(q.dtype).eps, walk * torch.finfo(torch.float32).eps)
        floor = step * max(1.0, float(exact.abs().max()))
        allowed = max(2 * float((theirs - exact).abs().max()), floor)
        assert float((x - exact).abs().max()) <= allowed, name


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked attention in the inputs' own dtype, as anybody would write it."""
    G, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    key = torch.arange(S)
    visits = (blocks[..., None] == key // block_size).any(-2)
    visits &= key <= torch.arange(S - T, S)[:, None]
    visits = visits.repeat_interleave(G, 1)
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~visits, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~visits.any(-1, keepdim=True), 0.0)
    return weights @ v, logits.float().logsumexp(-1)


def assert_equal_but_for_ties(got: Tensor, expected: Tensor, scores: Tensor) -> None:
    """Sets are equal, or differ in blocks whose scores float32 cannot tell apart."""
    for where in (got != expected).any(-1).nonzero().tolist():
        b, h, t = where
        mine, theirs = set(got[b, h, t].tolist()), set(expected[b, h, t].tolist())
        values = [float(scores[b, h, t, m]) for m in mine ^ theirs]
        assert len(mine) == len(theirs)
        assert max(values) - min(values) <= 1e-4 * min(values), (where, mine ^ theirs, values)


@settings(deadline=None, max_examples=60)
@given(problems())
def test_equals_reference(problem: tuple[Tensor, Tensor, Tensor, InfLLMv2Config]) -> None:
    check(*problem)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_equals_reference(level: str) -> None:
    """In a process of its own: the level is chosen once."""
    program = (
        "from test_cpu import *\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for G, T, D in ((16, 90, 64), (3, 333, 16), (20, 1, 40)):\n"
        "        q, k, v = (torch.randn(1, h, n, D).to(dtype)\n"
        "                   for h, n in ((2 * G, T), (2, 333), (2, 333)))\n"
        "        check(q, k, v, InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=16,\n"
        "                                      window_size=32, topk=3, dense_len=-1))\n"
        "print(LIBRARY.level)\n"
    )
    environment = {
        **os.environ,
        "INFLLM2_CPU_LEVEL": level,
        "PYTHONPATH": os.path.dirname(__file__),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # A processor below the level asked for runs its own best.
    assert done.stdout.strip() == min(level, LIBRARY.level, key=LEVELS.index)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("T", [1, 3, 200])
def test_results_do_not_depend_on_threads(threads: int, T: int) -> None:
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=5, dense_len=-1
    )
    q, k, v = (torch.randn(1, h, n, 32) for h, n in ((9, T), (3, 500), (3, 500)))
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            cpu = backends.get("cpu")
            out, blocks = cpu.run(q, k, v, *compress_keys(k, config), config, 0.2)
            found.append((out, blocks, cpu.dense(q, k, v, 0.2)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [2, 40, 128])
def test_compressed_keys_are_pytorch_s_to_the_bit(dtype: torch.dtype, D: int) -> None:
    config = InfLLMv2Config(kernel_size=12, kernel_stride=4, block_size=16, window_size=32, topk=3)
    k = torch.randn(2, 301, 3, D).to(dtype).transpose(1, 2)
    for length in (0, 11, 12, 47, 48, 301):
        part = k[:, :, :length]
        for mine, theirs in zip(
            compress_keys(part, config),
            (_means(part, 12, 4, factor) for factor in (1, 4)),
            strict=True,
        ):
            assert mine.shape == theirs.shape and torch.equal(mine, theirs)


def test_every_way_to_do_a_tile_is_exact() -> None:
    """Equal sets make tiles pay, scattered ones do not: all three ways of `attend_tile` run."""
    cpu = backends.get("cpu")
    S, n = 1024, 8
    for G in (1, 3, 8, 16):
        q, k, v = (torch.randn(1, h, S, 16) for h in (G, 1, 1))
        same = torch.arange(n).expand(1, 1, S, n)
        near = (torch.arange(S)[:, None] // 7 + torch.arange(n)) % 64
        far = torch.stack([torch.randperm(64)[:n] for _ in range(S)])
        for blocks in (same, near.expand(1, 1, S, n), far.expand(1, 1, S, n)):
            blocks = blocks.sort(-1).values.int().contiguous()
            out, lse = cpu.attend(q, k, v, blocks, block_size=16, scale=0.25)
            expected, expected_lse = reference.block_sparse_attention(
                q, k, v, blocks, block_size=16, scale=0.25
            )
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)


def test_output_buffers_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1
    )
    q, k, v = (torch.randn(2, h, n, 24) for h, n in ((6, 77), (2, 150), (2, 150)))
    keys = compress_keys(k, config)
    clean = backends.get("cpu").run(q, k, v, *keys, config, 0.2)
    empty = torch.empty

    def poisoned(*shape: object, **kwargs: object) -> Tensor:
        x = empty(*shape, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)
    LIBRARY._local.memory = None  # scratch comes poisoned too
    again = backends.get("cpu").run(q, k, v, *keys, config, 0.2)
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])


def test_gradients_are_those_of_the_torch_backend() -> None:
    config = InfLLMv2Config(
        kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1
    )
    q, k, v = (torch.randn(1, h, 150, 24) for h in (6, 2, 2))
    blocks = backends.get("cpu").select(q, *compress_keys(k, config), 150, config)
    grads = []
    for name in ("cpu", "torch"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = backends.get(name).attend(*leaves, blocks, block_size=16, scale=0.2)
        (out.sin().sum() + lse.sum()).backward()
        grads.append([x.grad for x in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_what_it_cannot_run_it_says() -> None:
    cpu = backends.get("cpu")
    of = backends.Inputs
    assert cpu.is_supported(of("cpu", torch.float64, 4, 2, 64)) == (
        False,
        "torch.float64 is neither float32 nor bfloat16",
    )
    assert "must be even, got 33" in cpu.is_supported(of("cpu", torch.bfloat16, 4, 2, 33))[1]
    assert "on cuda" in cpu.is_supported(of("cuda", torch.float32, 4, 2, 64))[1]

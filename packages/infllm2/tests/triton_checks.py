"""Checks of the Triton kernels, run by test_triton.py in Triton's interpreter, or on a GPU.

Each takes the device first. In the interpreter they run in a process of their own: triton reads
TRITON_INTERPRET when it is imported, and with it set `backend="auto"` would choose these kernels
for CPU tensors in every other test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infllm2 import InfLLMv2Config, backends, reference
from infllm2.compression import compress_keys

# Of results of order one: a few rounding steps of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; `config` changes the small configuration of `Case.settings`."""

    S: int
    T: int
    G: int
    D: int
    K: int = 2
    B: int = 1
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    strided: bool = False
    sharp: float = 1  # factor on q

    def settings(self) -> InfLLMv2Config:
        """Few tokens per block, so that short sequences have a choice to make."""
        small = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32}
        return InfLLMv2Config(**{**small, "topk": 3, "dense_len": -1, **self.config})

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, the same on every device."""
        generator = torch.Generator().manual_seed(self.S + self.T + self.G)

        def make(heads: int, length: int, factor: float = 1) -> Tensor:
            if self.strided:  # [B, length, heads, D] in memory, every second element of it
                x = factor * torch.randn(self.B, length, heads, 2 * self.D, generator=generator)
                return x.to(device, self.dtype)[..., ::2].transpose(1, 2)
            x = factor * torch.randn(self.B, heads, length, self.D, generator=generator)
            return x.to(device, self.dtype)

        q = make(self.K * self.G, self.T, self.sharp)
        return q, make(self.K, self.S), make(self.K, self.S)


@contextlib.contextmanager
def small_launches(programs: int = 1, scratch: int = 1 << 12, chunk: int = 4) -> Iterator[None]:
    """Limits low enough for short sequences to need many strips, chunks, or no split."""
    from infllm2.backends import triton_launch, triton_lists, triton_selection, triton_topk

    changes = [
        (triton_launch, "PROGRAMS", programs),
        (triton_lists, "SCRATCH_BYTES", scratch),
        (triton_selection, "SCRATCH_BYTES", scratch),
        (triton_topk, "CHUNK", chunk),
    ]
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


def selection(device: str, case: Case) -> None:
    """Sets equal the reference's in float64, but for scores that float32 cannot tell apart."""
    q, k, _ = case.tensors(device)
    config = case.settings()
    keys = compress_keys(k, config)
    got = backends.get("triton").select(q, *keys, case.S, config)
    wide = [x.double() for x in (q, *keys)]
    expected = reference.select_blocks(*wide, case.S, config)
    scores = reference.block_scores(*wide, case.S, config)
    assert got.dtype == torch.int32 and got.shape == expected.shape
    for where in (got != expected).any(-1).nonzero().tolist():
        b, h, t = where
        mine, theirs = set(got[b, h, t].tolist()), set(expected[b, h, t].tolist())
        values = [float(scores[b, h, t, m]) for m in mine ^ theirs]
        assert len(mine) == len(theirs)
        # Forced blocks, whose score is infinite, are never among them.
        assert max(values) - min(values) <= 1e-4 * min(values), (where, mine ^ theirs, values)


def attention(device: str, case: Case, gradients: bool = True) -> None:
    """Output, log-sum-exp and gradients: at most twice the error of PyTorch in the same dtype."""
    q, k, v = case.tensors(device)
    config = case.settings()
    size, scale = config.block_size, case.D**-0.5
    blocks = reference.select_blocks(q, *compress_keys(k, config), case.S, config)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    found = []
    for kind in ("truth", "torch", "triton"):
        dtype = torch.float64 if kind == "truth" else case.dtype
        # A view of a leaf, where the case is strided.
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        if kind == "truth":
            out, lse = reference.block_sparse_attention(
                *leaves, blocks, block_size=size, scale=scale
            )
            truth_lse = lse
        elif kind == "torch":
            mask = reference.visible_mask(blocks, case.T, case.S, size).repeat_interleave(case.G, 1)
            out = scaled_dot_product_attention(
                *leaves, attn_mask=mask, scale=scale, enable_gqa=True
            )
        else:
            out, lse = backends.get("triton").attend(*leaves, blocks, block_size=size, scale=scale)
            assert out.dtype == case.dtype and lse.dtype == torch.float32
            torch.testing.assert_close(
                lse, truth_lse.float(), atol=TOLERANCE[case.dtype], rtol=1e-4
            )
        if gradients:
            (out * weight.to(dtype)).sum().backward()
        found.append([out, *(x.grad for x in leaves)] if gradients else [out])
    for name, truth, plain, mine in zip(("out", "dq", "dk", "dv"), *found, strict=False):
        assert mine.isfinite().all(), name
        worst = max(1.0, float(truth.abs().max()))
        allowed = max(2 * float((plain - truth).abs().max()), TOLERANCE[case.dtype] / 10 * worst)
        assert float((mine - truth).abs().max()) <= allowed, name


def gradient_of_lse(device: str, case: Case) -> None:
    """Both outputs carry gradient, also where it arrives as an expanded tensor."""
    q, k, v = case.tensors(device)
    config = case.settings()
    blocks = reference.select_blocks(q, *compress_keys(k, config), case.S, config)
    grads = []
    for attend in (backends.get("triton").attend, reference.block_sparse_attention):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, blocks, block_size=config.block_size, scale=0.3)
        (out.sum() + lse.sin().sum()).backward()
        grads.append([x.grad for x in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def many_strips(device: str, case: Case) -> None:
    """As `selection` and `attention`, in strips of a few tokens and chunks of a few blocks."""
    with small_launches():
        selection(device, case)
        attention(device, case)


def without_splits(device: str, case: Case) -> None:
    """As `attention`, by the prefill kernels however few tokens there are."""
    with small_launches(scratch=1 << 20, chunk=1 << 13):
        attention(device, case)

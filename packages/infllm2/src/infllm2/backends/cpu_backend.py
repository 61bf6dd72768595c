"""The C++ kernels for CPUs: selection that never holds a queries × kernels matrix, block-sparse and
dense attention with a running maximum, one call for both steps.

float32 and bfloat16, any group size, even head sizes for bfloat16. Backward runs through the
`torch` backend on the same blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infllm2.backends import Inputs
from infllm2.backends.cpu_library import (
    DTYPES,
    AttendArgs,
    Kernels,
    RunArgs,
    SelectArgs,
    Selection,
    Shape,
    Strided,
    kernels,
)
from infllm2.config import InfLLMv2Config


class CpuBackend:
    """See `infllm2.backends.Backend`."""

    def is_supported(self, inputs: Inputs) -> tuple[bool, str]:
        """Whether the kernels are built and know these inputs."""
        if inputs.device != "cpu":
            return False, f"the tensors are on {inputs.device}"
        if inputs.dtype not in DTYPES:
            return False, f"{inputs.dtype} is neither float32 nor bfloat16"
        if inputs.dtype == torch.bfloat16 and inputs.head_dim % 2:
            return False, f"a bfloat16 head size must be even, got {inputs.head_dim}"
        library, reason = kernels()
        return library is not None, reason

    def select(
        self, q: Tensor, fine: Tensor, coarse: Tensor, length: int, config: InfLLMv2Config
    ) -> Tensor:
        """Blocks `[B, K, T, budget]`; see the protocol."""
        B, _, T, D = q.shape
        blocks = torch.empty(B, fine.shape[1], T, config.budget, dtype=torch.int32)
        if blocks.numel():
            q, fine, coarse = _rows(q), _rows(fine), _rows(coarse)
            threads = torch.get_num_threads()
            args, _work = _select_args(_library(), q, fine, coarse, length, config, threads)
            args.blocks = blocks.data_ptr()
            _library().select(args, threads)
        return blocks

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention over listed blocks, with autograd; see the protocol."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attend.apply(q, k, v, blocks, block_size, scale)
        return _attend(q, k, v, blocks.int(), block_size, scale)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention of the last T of S positions; no autograd."""
        return _attend(q, k, v, None, 64, scale)[0]

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fine: Tensor,
        coarse: Tensor,
        config: InfLLMv2Config,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Both steps, and the visited blocks; no autograd."""
        B, H, T, D = q.shape
        K, S = k.shape[1:3]
        threads = torch.get_num_threads()
        if B * K * T < threads:  # fewer queries than threads: share out the blocks of each
            blocks = self.select(q, fine, coarse, S, config)
            return _attend(q, k, v, blocks, config.block_size, scale)[0], blocks
        out = torch.empty(B, H, T, D, dtype=q.dtype)
        blocks = torch.empty(B, K, T, config.budget, dtype=torch.int32)
        if out.numel():
            q, k, v, fine, coarse = (_rows(x) for x in (q, k, v, fine, coarse))
            library = _library()
            select, _work = _select_args(library, q, fine, coarse, S, config, threads)
            select.blocks = blocks.data_ptr()
            attend, _more = _attend_args(
                library, q, k, v, None, out, None, config.block_size, scale, threads, 1
            )
            attend.width = config.budget
            attend.blocks = blocks.data_ptr()
            library.run(RunArgs(select, attend), threads)
        return out, blocks


BACKEND = CpuBackend()


class _Attend(torch.autograd.Function):
    """Forward by the kernels; backward through the torch backend, which sees the same blocks."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, block_size, scale):  # noqa: ANN001, ANN205
        ctx.save_for_backward(q, k, v, blocks)
        ctx.sizes = block_size, scale
        return _attend(q, k, v, blocks.int(), block_size, scale)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):  # noqa: ANN001, ANN205
        from infllm2.backends.torch_backend import BACKEND as by_torch

        *qkv, blocks = ctx.saved_tensors
        block_size, scale = ctx.sizes
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in qkv]
            out, lse = by_torch.attend(*leaves, blocks, block_size=block_size, scale=scale)
            grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
        return *grads, None, None, None


def _library() -> Kernels:
    library, reason = kernels()
    assert library is not None, reason  # is_supported said so
    return library


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it: rows contiguous, bfloat16 on 32 bits."""
    aligned = x.dtype == torch.float32 or (
        not any(s % 2 for s in x.stride()[:3]) and x.data_ptr() % 4 == 0
    )
    return x if x.stride(3) == 1 and aligned else x.contiguous().clone()


def _select_args(
    library: Kernels,
    q: Tensor,
    fine: Tensor,
    coarse: Tensor,
    length: int,
    config: InfLLMv2Config,
    threads: int,
) -> tuple[SelectArgs, Tensor]:
    """Arguments without `blocks`, and the scratch memory they point into."""
    shape = Shape.of(q, fine.shape[1], length)
    selection = Selection.of(config, q.shape[3])
    size = library.select_work(shape, selection)
    work = torch.empty(threads * size, dtype=torch.uint8)
    args = SelectArgs(
        shape, selection, Strided.of(q), Strided.of(fine), Strided.of(coarse),
        None, work.data_ptr(), size,
    )  # fmt: skip
    return args, work


def _attend_args(
    library: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    block_size: int,
    scale: float,
    threads: int,
    splits: int,
) -> tuple[AttendArgs, tuple[Tensor, ...]]:
    """Arguments, and what they point into."""
    shape = Shape.of(q, k.shape[1], k.shape[2])
    size = library.attend_work(shape)
    work = torch.empty(threads * size, dtype=torch.uint8)
    units = q.shape[0] * k.shape[1] * q.shape[2]
    partial = None if splits == 1 else torch.empty(units * splits * library.partial_floats(shape))
    args = AttendArgs(
        shape, Strided.of(q), Strided.of(k), Strided.of(v),
        None if blocks is None else blocks.data_ptr(), 0 if blocks is None else blocks.shape[3],
        out.data_ptr(), None if lse is None else lse.data_ptr(), work.data_ptr(), size,
        None if partial is None else partial.data_ptr(), splits, block_size, 0, scale, 0,
    )  # fmt: skip
    return args, tuple(x for x in (work, partial, blocks) if x is not None)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    K = k.shape[1]
    out = torch.empty(B, H, T, D, dtype=q.dtype)
    lse = torch.empty(B, H, T)
    if not out.numel():
        return out, lse
    if blocks is not None and not blocks.shape[3]:
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if scale < 0:  # the running maximum wants a positive factor
        q, scale = -q, -scale
    blocks = None if blocks is None else blocks.contiguous()
    threads = torch.get_num_threads()
    library = _library()
    # With few units of work, each is cut so that every thread has some (split-KV decoding).
    units = B * K * T if blocks is not None else B * K * -(-T * (H // K) // 128)
    splits = 1 if units % threads == 0 or units >= 4 * threads else threads
    args, _kept = _attend_args(
        library, q, k, v, blocks, out, lse, block_size, scale, threads, splits
    )
    library.attend(args, threads)
    if splits > 1:
        library.merge(args, threads)
    return out, lse

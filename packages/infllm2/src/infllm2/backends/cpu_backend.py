"""The C++ kernels for CPUs: selection that never holds a queries × kernels matrix, block-sparse and
dense attention with a running maximum and its gradients, one call for both steps.

float32 and bfloat16, any group size, even head sizes for bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from infllm2.backends import Inputs
from infllm2.backends.cpu_decode import DecodeStep
from infllm2.backends.cpu_library import (
    DTYPES,
    AttendArgs,
    BackwardArgs,
    CompressArgs,
    Kernels,
    RunArgs,
    SelectArgs,
    kernels,
    selection_of,
    shape_of,
    strided,
)
from infllm2.config import COARSE_FACTOR, InfLLMv2Config
from infllm2.layer_cache import LayerCache

# Rows (tokens × heads of a group) that are done together; `MOST_ROWS` of `csrc/rows.hpp`.
ROWS = 512


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
        blocks = torch.empty(
            q.shape[0], fine.shape[1], q.shape[2], config.budget, dtype=torch.int32
        )
        if blocks.numel():
            q, fine, coarse = _rows(q), _rows(fine), _rows(coarse)
            threads = torch.get_num_threads()
            library = _library()
            shape, selection = shape_of(q, fine.shape[1], length), selection_of(config, q.shape[3])
            size = library.sizes(shape, selection=selection)[0]
            args = SelectArgs(
                *shape, *selection, *strided(q), *strided(fine), *strided(coarse),
                blocks.data_ptr(), library.scratch(threads * size), size,
            )  # fmt: skip
            library.select(args, threads)
        return blocks

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention over listed blocks, with autograd; see the protocol."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attend.apply(q, k, v, blocks, block_size, scale)
        return _attend(q, k, v, blocks.int(), block_size, scale)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention of the last T of S positions, with autograd."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attend.apply(q, k, v, None, 64, scale)[0]
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
        if B * K * T < threads or (B * K * T % threads and B * K * T < 4 * threads):
            # Too few queries to go round: the blocks of each are shared out instead.
            blocks = self.select(q, fine, coarse, S, config)
            return _attend(q, k, v, blocks, config.block_size, scale)[0], blocks
        out = torch.empty(B, H, T, D, dtype=q.dtype)
        blocks = torch.empty(B, K, T, config.budget, dtype=torch.int32)
        if out.numel():
            q, k, v, fine, coarse = (_rows(x) for x in (q, k, v, fine, coarse))
            library = _library()
            shape, selection = shape_of(q, K, S), selection_of(config, D)
            mine, theirs, _ = library.sizes(shape, config.block_size, selection)
            work = library.scratch(threads * (mine + theirs))
            select = SelectArgs(
                *shape, *selection, *strided(q), *strided(fine), *strided(coarse),
                blocks.data_ptr(), work, mine,
            )  # fmt: skip
            attend = AttendArgs(
                *shape, *strided(q), *strided(k), *strided(v),
                blocks.data_ptr(), config.budget, out.data_ptr(), None, work + threads * mine,
                theirs, None, 1, _tile(B * K, T, H // K, threads), config.block_size, scale,
            )  # fmt: skip
            library.run(RunArgs(select, attend), threads)
        return out, blocks

    def step(
        self, store: LayerCache, q: Tensor, config: InfLLMv2Config, backend: str, dense_below: int
    ) -> DecodeStep | None:
        """What the next tokens of this cache go through; None where it has to be the long way."""
        if config.compat is not None or torch._C._functorch.peek_interpreter_stack():
            return None
        if store.length == config.budget * config.block_size:
            return None  # the next token is the first with something to choose from
        return DecodeStep(store, q, config, backend, dense_below)


BACKEND = CpuBackend()


def compress(
    keys: Tensor, config: InfLLMv2Config, fine: Tensor, coarse: Tensor,
    fine_range: tuple[int, int], coarse_range: tuple[int, int],
) -> None:  # fmt: skip
    """Write compressed keys j … of `keys` into buffers that hold all of them.

    Args:
        keys: `[B, Hkv, S, D]`, float32 or bfloat16, any strides but the last.
        config: sizes of the kernels.
        fine: `[B, Hkv, >= fine_range[1], D]`, likewise.
        coarse: `[B, Hkv, >= coarse_range[1], D]`, likewise.
        fine_range: first fine kernel to write, and the one after the last.
        coarse_range: the same for coarse ones.
    """
    count = fine_range[1] - fine_range[0] + coarse_range[1] - coarse_range[0]
    if not count or not keys.numel():
        return
    args = CompressArgs(
        *strided(keys), *strided(fine), *strided(coarse), *keys.shape[:2], keys.shape[3],
        *fine_range, *coarse_range, config.kernel_size, config.kernel_stride, COARSE_FACTOR,
        DTYPES[keys.dtype],
    )  # fmt: skip
    # A few kernels are not worth waking the other threads for.
    _library().compress(args, torch.get_num_threads() if count > 16 else 1)


class _Attend(torch.autograd.Function):
    """Attention over listed blocks, or all keys for `blocks=None`; the weights are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor | None,
        block_size: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        blocks = None if blocks is None else blocks.int()
        out, lse = _attend(q, k, v, blocks, block_size, scale)
        ctx.save_for_backward(q, k, v, blocks, out, lse)
        ctx.sizes = block_size, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, blocks, out, lse = ctx.saved_tensors
        delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
        return *_backward(q, k, v, blocks, *ctx.sizes, grad_out, lse, delta), None, None, None


def _library() -> Kernels:
    library, reason = kernels()
    assert library is not None, reason  # is_supported said so
    return library


def _tile(pairs: int, queries: int, group: int, threads: int) -> int:
    """Tokens done together: 512 rows, or fewer where threads would have nothing to do."""
    tile = max(1, min(ROWS // group, 128, queries))
    while tile > 1 and pairs * -(-queries // tile) < 4 * threads:
        tile //= 2
    return tile


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it: rows contiguous, bfloat16 on 32 bits."""
    batch, head, row, column = x.stride()
    if column == 1:
        if x.dtype == torch.float32 or not ((batch | head | row) & 1 or x.data_ptr() & 3):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the listed blocks, or over all for `blocks=None`."""
    B, H, T, D = q.shape
    K = k.shape[1]
    out = torch.empty(B, H, T, D, dtype=q.dtype)
    lse = torch.empty(B, H, T)
    if not out.numel():
        return out, lse
    if blocks is not None and not blocks.shape[3]:
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if scale < 0:  # the running maximum wants a factor that keeps the order
        q, scale = -q, -scale
    blocks = None if blocks is None else blocks.contiguous()
    threads = torch.get_num_threads()
    library = _library()
    # With few units of work, each is cut so that every thread has some (split-KV decoding).
    tile = _tile(B * K, T, H // K, threads)
    units = B * K * -(-T // tile)
    splits = 1 if units % threads == 0 or units >= 4 * threads else threads
    if splits > 1 and blocks is not None:
        tile, units = 1, B * K * T
    shape = shape_of(q, K, k.shape[2])
    _, size, floats = library.sizes(shape, block_size)
    partial = None if splits == 1 else torch.empty(units * splits * floats)
    args = AttendArgs(
        *shape, *strided(q), *strided(k), *strided(v),
        None if blocks is None else blocks.data_ptr(), 0 if blocks is None else blocks.shape[3],
        out.data_ptr(), lse.data_ptr(), library.scratch(threads * size), size,
        None if partial is None else partial.data_ptr(), splits, tile, block_size, scale,
    )  # fmt: skip
    library.attend(args, threads)
    if splits > 1:
        library.merge(args, threads)
    return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, in their dtype."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    if not q.numel() or (blocks is not None and not blocks.shape[3]):
        return dq, dk, dv
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad.to(q.dtype))
    if scale < 0:
        dq, dk, dv = _backward(-q, k, v, blocks, block_size, -scale, grad, lse, delta)
        return -dq, dk, dv
    blocks = None if blocks is None else blocks.contiguous()
    lse, delta = lse.contiguous(), delta.contiguous()
    threads = torch.get_num_threads()
    library = _library()
    shape = shape_of(q, K, S)
    size, floats = library.backward_sizes(shape, block_size)
    slots = 1 if B * K % threads == 0 else threads
    gradients = torch.empty(B * K * slots * floats)
    args = BackwardArgs(
        *shape, *strided(q), *strided(k), *strided(v),
        None if blocks is None else blocks.data_ptr(), 0 if blocks is None else blocks.shape[3],
        None, None, library.scratch(threads * size), size, None, 1,
        _tile(B * K, T, H // K, threads), block_size, scale, 0,
        *strided(grad), lse.data_ptr(), delta.data_ptr(), dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(), gradients.data_ptr(), slots,
    )  # fmt: skip
    library.backward(args, threads)
    library.gather(args, threads)
    return dq, dk, dv

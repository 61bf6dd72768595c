"""The fast pure-PyTorch backend: tiled selection, and attention that touches visited blocks only.

Attention has three parts, each where it is fastest (Letters as in `infllm2.reference`, M = B·K):

- a few queries (decode): gather the visited blocks of each query (`torch_gather`);
- many queries, the blocks next to them: all queries of a block share them, so they are read as
  strided views and go through PyTorch's fused attention in one batch (`torch_local`);
- many queries, scattered blocks: block by block, all queries that visit it at once
  (`torch_scatter`), so exactly the chosen pairs are computed, never the union over a tile of
  queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm2.backends import (
    DTYPES,
    Inputs,
    torch_gather,
    torch_local,
    torch_scatter,
    torch_selection,
)
from infllm2.config import InfLLMv2Config
from infllm2.eager import first_order
from infllm2.reference import working_dtype

# Up to so many queries, gathering each one's blocks beats going through the blocks one by one.
GATHER_QUERIES = 8
# Queries handled at once: bounds the lists of (query, block) pairs, whatever the length of the
# prompt.
STRIP = 8192


class TorchBackend:
    """Runs on any device and shape; tuned for CPUs."""

    def is_supported(self, inputs: Inputs) -> tuple[bool, str]:
        """Whether it can run on such inputs, and if not, why."""
        if inputs.dtype not in DTYPES:
            return False, f"dtype must be one of {DTYPES}, got {inputs.dtype}"
        if inputs.device == "meta":
            return False, "the tensors are on meta, where there are no values to choose by"
        return True, ""

    def select(
        self, q: Tensor, fine: Tensor, coarse: Tensor, length: int, config: InfLLMv2Config
    ) -> Tensor:
        """See `infllm2.select_blocks`."""
        return torch_selection.select(q, fine, coarse, length, config)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `infllm2.block_sparse_attention`."""
        if q.shape[2] <= GATHER_QUERIES or not q.numel():
            return torch_gather.attend(q, k, v, blocks, block_size=block_size, scale=scale)
        return _BlockSparse.apply(q, k, v, blocks, block_size, scale)


class _BlockSparse(torch.autograd.Function):
    """Forward by strips of queries; backward recomputes the weights from the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        B, H, T, D = q.shape
        K, S = k.shape[1], k.shape[2]
        q_MTGD, k_MSD, v_MSD = _rows(q, K), _keys(k), _keys(v)
        blocks_MTn = blocks.reshape(B * K, T, blocks.shape[3])
        out = torch.empty_like(q_MTGD)
        lse = q_MTGD.new_empty(B * K, T, H // K)
        for first in range(0, T, STRIP):
            part = slice(first, min(T, first + STRIP))
            out[:, part], lse[:, part] = _forward_strip(
                q_MTGD[:, part] * scale,
                k_MSD,
                v_MSD,
                blocks_MTn[:, part],
                S - T + first,
                block_size,
            )
        ctx.save_for_backward(q, k, v, blocks, out, lse)
        ctx.sizes = (block_size, scale)
        return _heads(out, B, q.dtype), _heads(lse[..., None], B, lse.dtype)[..., 0]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, blocks, out, lse = ctx.saved_tensors
        block_size, scale = ctx.sizes
        B, K, S = k.shape[:3]
        T = q.shape[2]
        q_MTGD, k_MSD, v_MSD = _rows(q, K), _keys(k), _keys(v)
        grad_MTGD = _rows(grad_out, K)
        # dS = P ∘ (dP − delta): the softmax's own term, less what reaches the log-sum-exp directly.
        delta = (grad_MTGD * out).sum(-1) - _rows(grad_lse[..., None], K)[..., 0]
        blocks_MTn = blocks.reshape(B * K, T, blocks.shape[3])
        dq, dk, dv = torch.zeros_like(q_MTGD), torch.zeros_like(k_MSD), torch.zeros_like(v_MSD)
        for first in range(0, T, STRIP):
            part = slice(first, min(T, first + STRIP))
            torch_scatter.backward(
                q_MTGD[:, part] * scale,
                k_MSD,
                v_MSD,
                torch_scatter.pairs(blocks_MTn[:, part], S - T + first, block_size),
                lse[:, part],
                grad_MTGD[:, part],
                delta[:, part],
                (dq[:, part], dk, dv),
                block_size,
                S - T + first,
            )
        dq *= scale
        return (
            _heads(dq, B, q.dtype),
            dk.view_as(k).to(k.dtype),
            dv.view_as(v).to(v.dtype),
            None,
            None,
            None,
        )


def _forward_strip(
    q_MTGD: Tensor, k_MSD: Tensor, v_MSD: Tensor, blocks_MTn: Tensor, start: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Attention of queries start … start + T − 1: local blocks fused, the rest scattered."""
    dense, window = torch_local.shared_blocks(blocks_MTn, start, block_size)
    # Fused attention masks by adding −inf, which turns a NaN key that a query may not see into a
    # NaN result. With such a key in sight (its sum shows it) every block takes the careful path.
    if not bool(k_MSD.sum().isfinite()):
        dense, window = 0, 0
    out, lse = torch_local.attend(q_MTGD, k_MSD, v_MSD, start, block_size, dense, window)
    if dense < q_MTGD.shape[1]:
        todo = torch_scatter.pairs(
            blocks_MTn[:, dense:], start + dense, block_size, skip_nearest=window
        )
        torch_scatter.forward(
            q_MTGD[:, dense:],
            k_MSD,
            v_MSD,
            todo,
            out[:, dense:],
            lse[:, dense:],
            block_size,
            start + dense,
        )
    return out, lse


def _rows(x: Tensor, K: int) -> Tensor:
    """[B, H, T, D] → working-precision [B·K, T, G, D]: the heads of a group side by side."""
    B, H, T, D = x.shape
    grouped = x.to(working_dtype(x)).view(B, K, H // K, T, D) if x.is_contiguous() else None
    if grouped is None:
        grouped = x.to(working_dtype(x)).unflatten(1, (K, H // K))
    return grouped.transpose(2, 3).reshape(B * K, T, H // K, D)


def _keys(x: Tensor) -> Tensor:
    """[B, K, S, D] → working-precision, contiguous [B·K, S, D]."""
    return x.to(working_dtype(x)).flatten(0, 1).contiguous()


def _heads(x_MTGD: Tensor, B: int, dtype: torch.dtype) -> Tensor:
    """[B·K, T, G, D] → [B, H, T, D]."""
    return x_MTGD.unflatten(0, (B, -1)).transpose(2, 3).flatten(1, 2).to(dtype)


BACKEND = TorchBackend()

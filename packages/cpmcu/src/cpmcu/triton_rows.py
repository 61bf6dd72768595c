"""What happens to each token between the products of a layer, in one launch each on a GPU.

A token is short, so a layer of it is a row of launches that each cost more than their work: fewer
are faster, in a CUDA graph too. Tested in Triton's interpreter and compiled for sm80 and sm90.
Letters: T tokens, W width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of a program of `add_norm_kernel`, where a row has fewer
PART = 1024  # of a program of `gate_kernel`


@triton.jit
def add_norm_kernel(
    x, y, weight, total, normed, T, W, alpha, eps, M: tl.constexpr, N: tl.constexpr
):
    """M tokens: total = x + alpha y, and its RMS norm."""
    t, column = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N)
    mask = (t < T)[:, None] & (column < W)[None, :]
    at = t.to(tl.int64)[:, None] * W + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += alpha * tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    held = value.to(total.dtype.element_ty)  # what the next layer sees too
    tl.store(total + at, held, mask=mask)
    value = held.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / W + eps)
    w = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)
    value = value * scale[:, None] * w[None, :]
    tl.store(normed + at, value.to(normed.dtype.element_ty), mask=mask)


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, *, alpha: float, eps: float
) -> tuple[Tensor, Tensor]:
    """x + alpha y, and that normalised (RMSNorm, arXiv:1910.07467) times weight.

    Args:
        x: [T, W], contiguous.
        y: as x.
        weight: [W].
        alpha: factor.
        eps: added to the mean square.

    Raises:
        ValueError: x or y is not contiguous.
    """
    T, W = x.shape
    _check_contiguous(x=x, y=y)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    N = triton.next_power_of_2(W)
    M = min(max(1, NUMBERS // N), triton.next_power_of_2(T))
    add_norm_kernel[(triton.cdiv(T, M),)](
        x, y, weight, total, normed, T, W, alpha, eps, M=M, N=N,
        num_warps=max(1, min(16, M * N // 512)),
    )  # fmt: skip
    return total, normed


@triton.jit
def gate_kernel(gate_up, out, size, W, N: tl.constexpr):
    """out = silu(gate) up, N numbers of it."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = at < size
    place = at // W * (2 * W) + at % W
    gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + W, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202) of both side by side: [T, 2 W] to [T, W].

    Raises:
        ValueError: it is not contiguous.
    """
    T, W = gate_up.shape[0], gate_up.shape[1] // 2
    _check_contiguous(gate_up=gate_up)
    out = torch.empty(T, W, dtype=gate_up.dtype, device=gate_up.device)
    gate_kernel[(triton.cdiv(T * W, PART),)](gate_up, out, T * W, W, N=PART)
    return out


def _check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}: call .contiguous()"
            )

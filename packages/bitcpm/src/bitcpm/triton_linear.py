"""Packed ternary products on GPUs: 2-bit weights times fp16, bf16 or fp32 activations (W1.58A16).

The codes stay as the file has them (codec "2bit", `packing.py`): a byte holds four neighbouring
columns of a row. One program makes a tile of outputs; for each tile of bytes it takes the four
planes apart, scales them and multiplies each with every fourth activation. A weight is exact
in the dtype of the scales, so results are those of the dequantised product with float32 sums.

Not timed by us: no GPU was at hand. It is tested in Triton's interpreter and compiled for sm80 and
sm90. Letters: O output features, I input features, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .config import groups_of
from .packing import PackedTensor, pack_codes

# Up to here a product is a sum in each program (decoding); above, tensor cores have work to do.
VECTOR_TOKENS = 4
ROWS, BYTES = 64, 32  # a program's outputs, and the bytes of each row that it takes at a time
TOKENS = 32
STAGES = 2  # more, and fp32 does not fit the shared memory of GPUs before sm90
VECTOR_ROWS, VECTOR_BYTES = 16, 64


@triton.jit
def _weights(codes, scales, row, byte, plane: tl.constexpr, O, I, W, G, size):
    """Weights [rows, bytes] of column 4 byte + plane, zero outside the matrix."""
    column = 4 * byte[None, :] + plane
    inside = (row[:, None] < O) & (column < I)
    packed = tl.load(codes + row[:, None].to(tl.int64) * W + byte[None, :], mask=inside, other=0x55)
    level = ((packed.to(tl.int32) >> (2 * plane)) & 3) - 1
    scale = tl.load(scales + row[:, None] * G + column // size, mask=inside, other=0.0)
    return level.to(scale.dtype) * scale


@triton.jit
def _vector(
    x, codes, scales, bias, out, O, I, W, G, size, x_row, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out[t, rows] for one token t: float32 sums across the columns."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    t = tl.program_id(1)
    total = tl.zeros((R, B), tl.float32)
    for first in range(0, W, B):
        byte = first + tl.arange(0, B)
        for plane in tl.static_range(4):
            w = _weights(codes, scales, row, byte, plane, O, I, W, G, size)
            column = 4 * byte + plane
            value = tl.load(x + t.to(tl.int64) * x_row + column, mask=column < I, other=0.0)
            total += w.to(tl.float32) * value.to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias + row, mask=row < O, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * O + row, y.to(out.dtype.element_ty), mask=row < O)


@triton.jit
def _matrix(
    x, codes, scales, bias, out, T, O, I, W, G, size, x_row, HAS_BIAS: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out[tokens, rows]: each plane of weights times every fourth activation."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.program_id(1) * M + tl.arange(0, M)
    total = tl.zeros((M, R), tl.float32)
    for first in range(0, W, B):
        byte = first + tl.arange(0, B)
        for plane in tl.static_range(4):
            w = _weights(codes, scales, row, byte, plane, O, I, W, G, size)
            column = 4 * byte[None, :] + plane
            inside = (token[:, None] < T) & (column < I)
            value = tl.load(
                x + token[:, None].to(tl.int64) * x_row + column, mask=inside, other=0.0
            )
            total = tl.dot(value, tl.trans(w.to(value.dtype)), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < O, other=0.0).to(tl.float32)[None, :]
    place = out + token[:, None].to(tl.int64) * O + row[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(token[:, None] < T) & (row[None, :] < O))


def ternary_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias of packed weights, on the GPU that holds them.

    Args:
        x: [..., I], float32, float16 or bfloat16.
        codes: uint8 [O, ceil(I / 4)], codec "2bit".
        scales: [O, groups], of the dtype of `x`.
        group_size: >= 1, or -1 for whole rows.
        bias: [O] or None.

    Returns:
        [..., O] in the dtype of `x`; sums are float32.

    Raises:
        ValueError: shapes, dtypes or devices do not belong together.
    """
    O, W = codes.shape
    I = x.shape[-1]
    size, full, tail = groups_of(I, group_size)
    if W != -(-I // 4) or scales.shape != (O, full + bool(tail)):
        raise ValueError(
            f"for x [..., {I}] in groups of {size}, codes must be [O, {-(-I // 4)}] and scales "
            f"[O, {full + bool(tail)}], got {list(codes.shape)} and {list(scales.shape)}"
        )
    if not x.dtype == scales.dtype or codes.dtype != torch.uint8 or x.device != codes.device:
        raise ValueError(
            f"x and scales must have one dtype, codes be uint8, all on one device: got {x.dtype}, "
            f"{scales.dtype}, {codes.dtype} on {x.device} and {codes.device}"
        )
    rows = x.reshape(-1, I)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    T = rows.shape[0]
    out = torch.empty(T, O, dtype=x.dtype, device=x.device)
    if T:
        common = (O, I, W, scales.shape[1], size, rows.stride(0), bias is not None)
        tensors = (rows, codes.contiguous(), scales.contiguous(), bias, out)
        if T <= VECTOR_TOKENS:
            grid = (triton.cdiv(O, VECTOR_ROWS), T)
            _vector[grid](*tensors, *common, VECTOR_ROWS, VECTOR_BYTES, num_stages=STAGES)
        else:
            grid = (triton.cdiv(O, ROWS), triton.cdiv(T, TOKENS))
            _matrix[grid](*tensors, T, *common, TOKENS, ROWS, BYTES, num_stages=STAGES)
    return out.reshape(*x.shape[:-1], O)


class TritonTernaryLinear(nn.Module):
    """An `nn.Linear` for inference whose weight stays packed on a GPU.

    Args:
        packed: the weight [O, I], in any codec; kept in "2bit".
        bias: [O] or None.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, packed: PackedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.group_size = packed.group_size
        codes, scales = packed.unpack()
        self.register_buffer("codes", pack_codes(codes, "2bit"))
        self.register_buffer("scales", scales.clone())
        bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Any:
        """`input` [..., I] times the weight transposed, plus the bias: [..., O]."""
        scales = self.scales.to(input.dtype)
        return ternary_matmul(input, self.codes, scales, self.group_size, self.bias)

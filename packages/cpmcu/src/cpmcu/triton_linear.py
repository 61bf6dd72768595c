"""Products with weights of 4 and 8 bits on GPUs: W4A16 and W8A16, for one token and for many.

A weight is a code times the float16 scale of its group of columns (`gpu_weights.IntWeights`). One
token is a sum in each program, in float32: a program takes some rows and walks their codes, read
once. From two tokens on, tiles of weights are rounded to the activations' dtype and multiplied by
matrix units. Where too few programs would run, several share the columns, each leaves its part in
float32, and a second launch adds the parts in order: the same bits every time.

Tested in Triton's interpreter and compiled for sm80 and sm90; no GPU was at hand, so the sizes
below were never timed. Letters: O rows (outputs), I columns (inputs), T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from cpmcu.gpu_weights import IntWeights

# One token waits for memory: to use all of a large GPU's bandwidth, some 16 KB must be under way on
# each of its 132 multiprocessors. A program asks for 4 KB at a time, so there should be four.
ROWS, BYTES = 8, 512  # a program's rows, and the bytes of each that it takes at a time
VECTOR_PROGRAMS = 512  # with fewer the columns are shared
# Tiles: matrix units want many columns, and each part of the columns costs a result in float32.
PROGRAMS = 256
FEW, MANY = 16, 64  # tokens of a tile
TILE_ROWS, TILE_COLUMNS = 64, 64
STAGES = 3


@triton.jit
def _weights(
    codes, scales, row, unit, plane: tl.constexpr, O, units,
    BITS: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Weights [rows, units, U] in float32 of units of 32 columns, zero outside of the matrix."""
    inside = (row < O)[:, None] & (unit < units)[None, :]
    byte = unit[:, None] * U + tl.arange(0, U)[None, :]
    place = row.to(tl.int64)[:, None, None] * (units * U) + byte[None, :, :]
    level = tl.load(codes + place, mask=inside[:, :, None], other=0).to(tl.int32)
    if BITS == 4:
        level = ((level >> (4 * plane)) & 15) - 8
    group = row[:, None] * (units * 32 // GROUP) + (unit * 32 // GROUP)[None, :]
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    return level.to(tl.float32) * scale[:, :, None]


@triton.jit
def vector_kernel(
    x, codes, scales, bias, out, O, units,
    BITS: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[split, rows] of one token, R rows a program, N units of 32 columns a step."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    split = tl.program_id(1)
    share = (units + SPLITS * N - 1) // (SPLITS * N) * N
    begin = split * share
    total = tl.zeros((R, N, U), tl.float32)
    for first in range(begin, tl.minimum(begin + share, units), N):
        unit = first + tl.arange(0, N)
        for plane in tl.static_range(8 // BITS):
            w = _weights(codes, scales, row, unit, plane, O, units, BITS, GROUP, U)
            column = unit[:, None] * 32 + plane * U + tl.arange(0, U)[None, :]
            value = tl.load(x + column, mask=(unit < units)[:, None], other=0.0).to(tl.float32)
            total += w * value[None, :, :]
    y = tl.sum(tl.sum(total, 2), 1)
    if HAS_BIAS:
        y += tl.load(bias + row, mask=row < O, other=0.0).to(tl.float32)
    tl.store(out + split.to(tl.int64) * O + row, y.to(out.dtype.element_ty), mask=row < O)


@triton.jit
def matrix_kernel(
    x, codes, scales, bias, out, T, O, units, x_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[split, tokens, rows]: tiles of M tokens and R rows, N units of 32 columns a step."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.program_id(1) * M + tl.arange(0, M)
    split = tl.program_id(2)
    share = (units + SPLITS * N - 1) // (SPLITS * N) * N
    begin = split * share
    k = tl.arange(0, N * U)
    tokens = token.to(tl.int64)[:, None] * x_row
    total = tl.zeros((M, R), tl.float32)
    for first in range(begin, tl.minimum(begin + share, units), N):
        unit = first + tl.arange(0, N)
        for plane in tl.static_range(8 // BITS):
            w = _weights(codes, scales, row, unit, plane, O, units, BITS, GROUP, U)
            column = (first + k // U) * 32 + plane * U + k % U
            inside = (token < T)[:, None] & (column < units * 32)[None, :]
            value = tl.load(x + tokens + column[None, :], mask=inside, other=0.0)
            w = tl.reshape(w, (R, N * U)).to(value.dtype)
            total = tl.dot(value, tl.trans(w), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < O, other=0.0).to(tl.float32)[None, :]
    place = out + (split.to(tl.int64) * T + token[:, None]) * O + row[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(token < T)[:, None] & (row < O)[None, :])


@triton.jit
def merge_kernel(
    parts, bias, out, size, O, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, N: tl.constexpr
):
    """out [size] = the sum of parts [SPLITS, size], first to last, plus the bias of each row."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % O, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def splits(programs: int, wanted: int, steps: int) -> int:
    """Parts to cut the columns of each of `programs` into: a power of two, at most `steps`."""
    wanted = -(-wanted // programs)
    return min(1 << (wanted - 1).bit_length(), 1 << (steps.bit_length() - 1))


def multiply(x: Tensor, weights: IntWeights, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, on the GPU that holds the weights.

    Args:
        x: [T, I], float32, float16 or bfloat16; a row's elements are neighbours.
        weights: [O, I].
        bias: [O] or None.

    Returns:
        [T, O] in the dtype of x; sums are float32. With one token the weights are exact; with more
        they are rounded to the dtype of x first.

    Raises:
        ValueError: x does not fit the weights.
    """
    O, I = weights.shape
    if x.dim() != 2 or x.shape[1] != I or x.stride(1) != 1 or x.device != weights.codes.device:
        raise ValueError(
            f"x must be [tokens, {I}] on {weights.codes.device}, its rows without gaps; got "
            f"{list(x.shape)} with strides {x.stride()} on {x.device}"
        )
    T, units, unit_bytes = x.shape[0], I // 32, 4 * weights.bits
    out = torch.empty(T, O, dtype=x.dtype, device=x.device)
    if not T:
        return out
    one = T == 1
    tokens = FEW if T <= FEW else MANY
    rows = ROWS if one else TILE_ROWS
    # Units of a step: the bytes of one token's program, or the columns of a tile's planes.
    step = BYTES // unit_bytes if one else TILE_COLUMNS // unit_bytes
    grid = (triton.cdiv(O, rows), *(() if one else (triton.cdiv(T, tokens),)))
    programs = grid[0] if one else grid[0] * grid[1]
    parts = splits(programs, VECTOR_PROGRAMS if one else PROGRAMS, triton.cdiv(units, step))
    target = out if parts == 1 else out.new_empty(parts, T, O, dtype=torch.float32)
    kind = (weights.bits, weights.group, unit_bytes, bias is not None and parts == 1, parts)
    tensors = (x, weights.codes, weights.scales, bias, target)
    if one:
        vector_kernel[(*grid, parts)](*tensors, O, units, *kind, rows, step, num_stages=STAGES)
    else:
        matrix_kernel[(*grid, parts)](
            *tensors, T, O, units, x.stride(0), *kind, tokens, rows, step, num_stages=STAGES
        )
    if parts > 1:
        merge_kernel[(triton.cdiv(T * O, 256),)](
            target, bias, out, T * O, O, bias is not None, parts, 256
        )
    return out

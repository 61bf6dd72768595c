"""Ternary matrices in ggml's block formats, and back: TQ1_0, TQ2_0 and, as a carrier, Q4_0.

    TQ2_0  256 weights: 64 bytes, fp16 d. In each half of 128, byte m has weight m + 32 l in bits
           2l.
    TQ1_0  256 weights: 48 bytes with 5 digits, 4 bytes with 4 digits, fp16 d. A byte of digits in
           base 3, the first on top, is ceil(v 256 / 243). The first 32 bytes hold weights
           m + 32 l of the first 160, the next 16 bytes m + 16 l of the next 80, the last 4 bytes
           m + 4 l of the last 16.
    Q4_0   32 weights: fp16 d, 16 bytes; byte m has weight m in its low and m + 16 in its high four
           bits, as c + 8. 4.5 bits, but the only wide-spread format that holds groups of 32 to 128.

A digit is c + 1. TQ1_0 and TQ2_0 bytes are those that ggml's own quantiser writes. All of them keep
one fp16 scale for a block: where that is not the model's own scale the result is another model, so
`to_ggml` refuses, or says what it costs.

Letters: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import groups_of
from .packing import PackedTensor, pack_codes

# Weights and bytes of a block.
BLOCKS = {"TQ1_0": (256, 54), "TQ2_0": (256, 66), "Q4_0": (32, 18)}
_TOP_FIRST = np.array([81, 27, 9, 3, 1], np.uint16)


@dataclass(frozen=True, slots=True)
class GgmlTensor:
    """One matrix in a ggml type.

    Attributes:
        data: uint8 [O, bytes of a row].
        kind: a key of `BLOCKS`.
        shape: (O, I).
        error: ||W - W'|| / ||W|| (Frobenius) of what the type holds; 0.0 if it is exact.
    """

    data: np.ndarray
    kind: str
    shape: tuple[int, int]
    error: float


def to_ggml(packed: PackedTensor, kind: str, allow_error: bool = False) -> GgmlTensor:
    """A packed matrix in a ggml type.

    Args:
        packed: the matrix.
        kind: "TQ1_0", "TQ2_0" or "Q4_0".
        allow_error: accept scales that the type rounds, and blocks that span several groups (whose
            weights are then rounded to the block's largest scale, as ggml would).

    Raises:
        ValueError: the kind is unknown; a row is no whole number of blocks; the type does not hold
            the weights exactly and `allow_error` is not set (says how far off it is).
    """
    if kind not in BLOCKS:
        raise ValueError(f"kind must be one of {', '.join(BLOCKS)}; got {kind!r}")
    O, I = packed.shape
    size, _ = BLOCKS[kind]
    if I % size:
        raise ValueError(f"{kind} holds rows of whole blocks of {size} weights, got rows of {I}")
    weights = packed.dequantise(torch.float32)
    blocks = weights.unflatten(1, (I // size, size))
    largest = blocks.abs().amax(-1)
    scales = largest.half()
    # Half of the largest decides, as in ggml: where all weights of a block share a scale, exactly.
    codes = torch.where(2 * blocks.abs() >= largest[..., None], blocks.sign(), 0).to(torch.int8)
    held = codes.float() * scales.float()[..., None]
    norm = blocks.double().norm().item()
    lost = (blocks.double() - held.double()).norm().item()
    error = lost / norm if norm else 0.0
    if lost and not allow_error:
        group = "whole rows" if packed.group_size == -1 else f"groups of {packed.group_size}"
        dtype = str(packed.scales.dtype).removeprefix("torch.")
        raise ValueError(
            f"{kind} has one fp16 scale for {size} weights and cannot hold {group} with "
            f"{dtype} scales: relative error {error:.3g}. "
            "Use another type, or allow_error to accept it"
        )
    data = _WRITERS[kind](codes.numpy(), scales.numpy())
    return GgmlTensor(data.reshape(O, -1), kind, packed.shape, error)


def from_ggml(
    data: np.ndarray, kind: str, shape: tuple[int, int], codec: str = "1.6bit"
) -> PackedTensor:
    """The matrix that a ggml type holds, exactly: groups of one block, fp16 scales.

    Raises:
        ValueError: the kind is unknown; the bytes do not belong to the shape, or are not ternary.
    """
    if kind not in BLOCKS:
        raise ValueError(f"kind must be one of {', '.join(BLOCKS)}; got {kind!r}")
    size, width = BLOCKS[kind]
    O, I = shape
    if I % size or data.dtype != np.uint8 or data.shape != (O, I // size * width):
        raise ValueError(
            f"{kind} bytes of a {shape} matrix must be uint8 {[O, I // size * width]} with rows of "
            f"whole blocks of {size}, got {data.dtype} {list(data.shape)}"
        )
    codes, scales = _READERS[kind](data.reshape(O, I // size, width))
    if codes.min(initial=0) < -1 or codes.max(initial=0) > 1:
        raise ValueError(f"these {kind} weights are not ternary")
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise ValueError(f"a {kind} scale is not a number >= 0: damaged data")
    packed = pack_codes(torch.from_numpy(codes.reshape(O, I)), codec)
    return PackedTensor(packed, torch.from_numpy(scales), shape, size, codec)


def exact_kinds(packed: PackedTensor) -> list[str]:
    """The types that hold this matrix without loss, smallest first."""
    found = []
    for kind in BLOCKS:
        try:
            to_ggml(packed, kind)
        except ValueError:
            continue
        found.append(kind)
    return found


def fits(in_features: int, group_size: int, kind: str) -> bool:
    """Whether blocks of `kind` lie inside groups (fp16 may still not hold the scales)."""
    size, _ = BLOCKS[kind]
    group, _, tail = groups_of(in_features, group_size)
    return in_features % size == 0 and group % size == 0 and tail % size == 0


def _with_scale(codes: np.ndarray, scales: np.ndarray, first: bool = False) -> np.ndarray:
    raw = scales.astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate([raw, codes] if first else [codes, raw], -1)


def _write_tq2(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    digits = (codes + 1).astype(np.uint8).reshape(*codes.shape[:2], 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    return _with_scale(
        (digits << shifts).sum(-2, dtype=np.uint8).reshape(*scales.shape, 64), scales
    )


def _read_tq2(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    digits = blocks[..., :64].reshape(*blocks.shape[:2], 2, 1, 32) >> shifts & 3
    return digits.reshape(*blocks.shape[:2], 256).astype(np.int8) - 1, _scale(blocks[..., 64:])


# Bytes, digits a byte and distance of the digits, of the three parts of TQ1_0.
_TQ1_PARTS = ((32, 5), (16, 5), (4, 4))


def _write_tq1(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    digits = (codes + 1).astype(np.uint16)
    parts, begin = [], 0
    for width, count in _TQ1_PARTS:
        part = digits[..., begin : begin + width * count].reshape(*scales.shape, count, width)
        value = (part * _TOP_FIRST[:count, None]).sum(-2, dtype=np.uint16)
        parts.append(((value * 256 + 242) // 243).astype(np.uint8))
        begin += width * count
    return _with_scale(np.concatenate(parts, -1), scales)


def _read_tq1(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts, begin = [], 0
    for width, count in _TQ1_PARTS:
        part = blocks[..., begin : begin + width].astype(np.uint16)[..., None, :]
        powers = np.array([1, 3, 9, 27, 81], np.uint16)[:count, None]
        parts.append((part * powers % 256 * 3 >> 8).reshape(*blocks.shape[:2], -1))
        begin += width
    return np.concatenate(parts, -1).astype(np.int8) - 1, _scale(blocks[..., 52:])


def _write_q4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    digits = (codes + 8).astype(np.uint8)
    return _with_scale(digits[..., :16] | digits[..., 16:] << 4, scales, first=True)


def _read_q4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    return np.concatenate([low, high], -1).astype(np.int8) - 8, _scale(blocks[..., :2])


def _scale(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


_WRITERS = {"TQ1_0": _write_tq1, "TQ2_0": _write_tq2, "Q4_0": _write_q4}
_READERS = {"TQ1_0": _read_tq1, "TQ2_0": _read_tq2, "Q4_0": _read_q4}


def dequantise_ggml(tensor: GgmlTensor) -> Tensor:
    """The float32 weights [O, I] that a ggml tensor stands for."""
    packed = from_ggml(tensor.data, tensor.kind, tensor.shape)
    return packed.dequantise(torch.float32)

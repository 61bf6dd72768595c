"""ggml's block formats that the kernels hold: Q4_0 and Q8_0, to codes and back.

    Q4_0  32 weights, 18 bytes: float16 d, then byte m has code + 8 of weight m in its low and of
          weight m + 16 in its high four bits.
    Q8_0  32 weights, 34 bytes: float16 d, then 32 signed bytes.

A weight is code * d in both. The CPU's kernels also hold Q4_1 and Q4_K, whose weights are shifted
(`stored`); other formats of more than 4 bits they round to 8. The other backends expand all these,
and round anew what is to have 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cpmcu._torch import torch
from cpmcu.codes import Codes

if TYPE_CHECKING:
    from cpmcu.gguf_file import GGUFFile

SIZE = 32  # weights of a block
KINDS = {"Q4_0": 4, "Q8_0": 8}
# Bits in which the CPU's kernels hold a type, with a scale for 32 weights.
NATIVE_KINDS = KINDS | {"Q4_1": 4, "Q4_K": 4, "Q5_0": 8, "Q5_1": 8, "Q5_K": 8, "Q6_K": 8}


def to_blocks(matrix: Codes) -> np.ndarray:
    """Codes as bytes of Q4_0 (4 bits) or Q8_0, uint8 [O, bytes of a row]: nothing is rounded."""
    matrix = matrix.regrouped(SIZE)
    O, I = matrix.shape
    scales = matrix.scales.numpy().reshape(O, I // SIZE, 1).view(np.uint8)
    codes = matrix.codes.numpy().reshape(O, I // SIZE, SIZE)
    if matrix.bits == 4:
        shifted = (codes + 8).astype(np.uint8)
        codes = shifted[..., : SIZE // 2] | shifted[..., SIZE // 2 :] << 4
    return np.concatenate([scales, codes.view(np.uint8)], -1).reshape(O, -1)


def from_blocks(raw: np.ndarray, bits: int) -> Codes:
    """The inverse of `to_blocks`; `raw` uint8 [O, bytes of a row]."""
    blocks = raw.reshape(len(raw), -1, 2 + SIZE * bits // 8)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    codes = np.ascontiguousarray(blocks[..., 2:])
    if bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], -1).astype(np.int8) - np.int8(8)
    codes = codes.view(np.int8).reshape(len(raw), -1)
    return Codes(torch.from_numpy(codes), torch.from_numpy(scales.copy()), bits)


def read(file: GGUFFile, name: str) -> Codes | None:
    """The matrix `name` of a GGUF file as codes; None where its type is another.

    Raises:
        ValueError: a scale is not finite.
    """
    info = file.tensors[name]
    bits = KINDS.get(info.kind.name)
    if bits is None or len(info.shape) != 2:
        return None
    raw = file.raw(name).reshape(info.shape[0], info.nbytes // info.shape[0])
    matrix = from_blocks(raw, bits)
    if not bool(matrix.scales.isfinite().all()):
        raise ValueError(scale_fault(file, name))
    return matrix


def scale_fault(file: GGUFFile, name: str) -> str:
    """What is wrong where a scale of the tensor `name` is not finite."""
    return str(file.error(f"tensor '{name}' has a scale that is not finite: copy the file again"))


def quant_of(file: GGUFFile, kinds: Mapping[str, int] = KINDS) -> str | None:
    """The kind of weights that most of a file's layers have: of `kinds`, "int4" or "int8"; None
    where their type is not among them.
    """
    sizes: dict[str, int] = {}
    for name, info in file.tensors.items():
        if name.startswith("blk.") and len(info.shape) == 2:
            sizes[info.kind.name] = sizes.get(info.kind.name, 0) + prod(info.shape)
    most = max(sizes, key=lambda kind: sizes[kind], default="")
    return f"int{kinds[most]}" if most in kinds else None

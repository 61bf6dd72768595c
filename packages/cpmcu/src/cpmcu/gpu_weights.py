"""Weights laid out for a GPU: floats in the engine's dtype, codes of 8 and 4 bits, ternary ones.

Codes keep their groups of 32, 64 or 128 columns. Bytes of 4-bit codes are those of GGUF's Q4_0: of
32 columns, byte m holds column m in its low half and column m + 16 in its high half, each code plus
8. So a byte's two codes meet activations that are neighbours of those of the next byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmcu import ternary
from cpmcu.codes import BITS, Codes, nearest
from cpmcu.rounding import GROUP
from cpmcu.spec import ModelSpec
from cpmcu.weights import Weights


@dataclass(slots=True)
class IntWeights:
    """`[O, I]` codes times scales.

    Attributes:
        codes: int8 [O, I], or uint8 [O, I / 2] as above.
        scales: float16 [O, I / group].
        bits: 4 or 8.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    @classmethod
    def of(cls, matrix: Codes, device: torch.device) -> IntWeights:
        """Codes in this layout, on a device."""
        codes = matrix.codes
        if matrix.bits == 4:
            low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, 16)).unbind(2)
            codes = (low | high << 4).flatten(1)
        return cls(codes.to(device), matrix.scales.to(device), matrix.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.codes.shape[1] * (8 // self.bits)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of some rows, [len(index), I]."""
        codes, scales = self.codes.index_select(0, index), self.scales.index_select(0, index)
        if self.bits == 4:
            halves = codes.unflatten(1, (-1, 1, 16))
            codes = torch.cat((halves & 15, halves >> 4), 2).flatten(1).to(torch.int8) - 8
        return Codes(codes, scales, self.bits).dequantise(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, I] times the transpose: [T, O]."""
        from cpmcu import triton_linear

        return triton_linear.multiply(x, self, bias)


@dataclass(slots=True)
class TernaryWeights:
    """`[O, I]` of {-a, 0, a}, bitcpm's codec "2bit": 4 columns to a byte, a scale for a group."""

    codes: Tensor
    scales: Tensor
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, I] times the transpose: [T, O]."""
        from bitcpm.triton_linear import ternary_matmul

        return ternary_matmul(x, self.codes, self.scales, self.group, bias)


@dataclass(slots=True)
class FloatWeights:
    """`[O, I]` numbers."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows, [len(index), I]."""
        return F.embedding(index, self.values).to(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, I] times the transpose: [T, O]."""
        return F.linear(x, self.values, bias)


def pack(weight: Tensor | Codes, quant: str, dtype: torch.dtype, device: torch.device) -> Any:
    """One matrix. Codes stay as they are; floats are rounded to the nearest for int4 and int8, 32
    columns to a scale.

    Raises:
        ValueError: the columns are no whole groups.
    """
    if isinstance(weight, Codes):
        return IntWeights.of(weight, device)
    if quant in BITS:
        return IntWeights.of(nearest(weight, BITS[quant], GROUP), device)
    return FloatWeights(weight.to(device, dtype))


def pack_model(
    spec: ModelSpec, weights: Weights, quant: str, dtype: torch.dtype, device: torch.device
) -> Weights:
    """All weights on a device, matrices as one of the classes above. With "int4" and "ternary"
    embedding and head have 8 bits, and so have a layer's matrices that are not ternary.

    Layers of `weights` are taken one by one and let go.

    Raises:
        ValueError: columns that the kind cannot have, or "ternary" where nothing is.
    """
    outer = "int8" if quant in ("int4", "ternary") else quant
    found = 0

    def inner(weight: Tensor | Codes) -> Any:
        nonlocal found
        packed = ternary.packed(weight, "2bit") if quant == "ternary" else None
        if packed is None:
            return pack(weight, "int8" if quant == "ternary" else quant, dtype, device)
        found += 1
        codes, scales = packed.codes.to(device), packed.scales.to(device, dtype)
        return TernaryWeights(codes, scales, packed.group_size)

    vector: Callable[[Tensor], Tensor] = lambda x: x.to(device, dtype)  # noqa: E731
    embedding = pack(weights.embedding, outer, dtype, device)
    head = embedding if spec.tie else pack(weights.head, outer, dtype, device)
    norm = vector(weights.norm)
    weights.embedding = weights.head = torch.empty(0)
    layers = [layer.mapped(inner, vector) for layer in weights.layers]
    if quant == "ternary":
        ternary.check_found(found)
    return Weights(embedding, layers, norm, head)

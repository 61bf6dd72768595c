"""Weights laid out for the CPU kernels: panels of 16 rows, in float, bfloat16, 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpmcu import cpu_library as c
from cpmcu import cpu_ternary, stored
from cpmcu.cpu_ternary import TernaryWeights
from cpmcu.huge_pages import Arena
from cpmcu.rounding import GROUP
from cpmcu.spec import ModelSpec
from cpmcu.stored import Part, Stored
from cpmcu.ternary import check_found
from cpmcu.weights import Weights

KINDS = {"float32": c.FLOAT32, "bfloat16": c.BFLOAT16, "int8": c.INT8, "int4": c.INT4}


@dataclass(slots=True)
class PackedMatrix:
    """`[rows, cols]` weights in the layout of `csrc/args.h`.

    Attributes:
        data: bytes of the panels.
        scales: float16 bits, `[panels, cols / 32, 16]`; None for floats.
        struct: the same for C.
    """

    data: np.ndarray
    scales: np.ndarray | None
    struct: Any

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight: Any, kind: int, pool: c.Pool, arena: Arena | None = None) -> PackedMatrix:
    """Lay out weights; integers are quantised, 32 columns to a scale. Codes stay as they are.

    Args:
        weight: `[rows, cols]`, what `stored.of` takes: float32 or bfloat16, or codes.
        kind: FLOAT32, BFLOAT16, INT8 or INT4 of `cpu_library`; codes have their own.
        pool: threads that do it.
        arena: where the matrix goes; None: memory of its own.

    Raises:
        ValueError: the columns do not fill the layout's units, or a scale is not finite.
    """
    given = stored.of(weight)
    (rows, cols), group = given.shape, GROUP
    if given.quant is not None:
        kind, group = KINDS[given.quant], given.group
    unit = {c.FLOAT32: 1, c.BFLOAT16: 2}.get(kind, GROUP)
    if cols % unit:
        raise ValueError(
            f"{'int8 and int4' if unit == GROUP else 'bfloat16'} weights need a multiple of {unit} "
            f"columns, got {given.shape}: take another quant"
        )
    integers = kind in (c.INT8, c.INT4)
    panels = -(-rows // 16)
    matrix = c.Matrix(None, None, rows, cols, kind, group if integers else 0)
    arena, scales = arena or Arena(2 << 20), None
    data = arena.empty(c.loaded().size("matrix_bytes", matrix))
    if integers:
        scales = arena.empty(2 * panels * cols // group * 16).view(np.uint16)
    matrix.data, matrix.scales = c.address(data), c.address(scales)
    done = 0
    for part in given.parts():
        _lay_out(part, matrix, done, given, pool)
        done += part.shape[0]
    if done != rows:
        raise ValueError(f"the parts of a matrix have {done} rows together, expected {rows}")
    return PackedMatrix(data, scales, matrix)


def _lay_out(part: Part, matrix: Any, first: int, whole: Stored, pool: c.Pool) -> None:
    kept = whole.quant is not None
    through = not kept and whole.dtype == "bfloat16" and part.source != "bfloat16"
    args = c.LayOutArgs(
        c.address(part.memory), part.row_bytes, matrix, c.address(part.scales),
        c.SOURCES[part.source], part.group, first, part.shape[0], part.heads, through, kept,
    )  # fmt: skip
    try:
        pool.run(c.Records([("lay_out", args)]))
    except c.OperationError as error:
        if error.code == 2:
            raise ValueError(part.fault) from None
        raise


def pack_model(spec: ModelSpec, weights: Weights, quant: str, pool: c.Pool) -> Weights:
    """All weights in one kind, norms and biases in float32. With "int4" and "ternary" embedding and
    head have 8 bits, and so have a layer's matrices that are not ternary.

    Layers of `weights` are taken one by one; where they are read only then (`tensors.load`), both
    layouts are never held whole.

    Raises:
        ValueError: columns that the kind cannot have, or "ternary" where nothing is.
    """
    outer = c.INT8 if quant in ("int4", "ternary") else KINDS[quant]

    found, arena = 0, Arena()

    def inner(x: Any) -> PackedMatrix | TernaryWeights:
        nonlocal found
        if quant != "ternary":
            return pack(x, KINDS[quant], pool, arena)
        packed = cpu_ternary.pack(x, pool)
        found += packed is not None
        return packed or pack(x, c.INT8, pool, arena)

    embedding = pack(weights.embedding, outer, pool, arena)
    head = embedding if spec.tie else pack(weights.head, outer, pool, arena)
    norm = stored.vector(weights.norm)
    weights.embedding = weights.head = None
    layers = [layer.mapped(inner, stored.vector) for layer in weights.layers]
    if quant == "ternary":
        check_found(found)
    return Weights(embedding, layers, norm, head)

"""Weights laid out for the CPU kernels: panels of 16 rows, in float, bfloat16, 8 or 4 bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
        shifts: of 4-bit weights that have them, likewise; else None.
        struct: the same for C.
    """

    data: np.ndarray
    scales: np.ndarray | None
    shifts: np.ndarray | None
    struct: Any

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = self.data, self.scales, self.shifts
        return sum(part.nbytes for part in parts if part is not None)


class Layouts:
    """Matrices to be laid out, a few at a time, by all threads of a pool.

    Nothing is read before `finish`, or before what waits has `MOST` bytes: what `add` was given is
    held until then.

    Args:
        pool: threads that do it.
        meanwhile: called in this thread, once, while the others are at it; `finish` gives what it
            returned. It may well hold Python's lock for long.
    """

    MOST, SLICE = 64 << 20, 1 << 20

    def __init__(self, pool: c.Pool, meanwhile: Callable[[], Any] | None = None) -> None:
        self._pool, self._meanwhile, self._answer = pool, meanwhile, None
        self._waiting: list[tuple[Part, Any, PackedMatrix]] = []  # memory stays while it waits
        self._bytes = 0

    def add(self, weight: Any, kind: int, arena: Arena | None = None) -> PackedMatrix:
        """A matrix that `finish` will fill; arguments as in `pack`.

        Raises:
            ValueError: the columns do not fill the layout's units, or a scale is not finite.
        """
        given = stored.of(weight)
        matrix = _room(given, kind, arena or Arena(2 << 20))
        done = 0
        for part in given.parts():
            if done + part.shape[0] <= given.shape[0]:  # no row is written behind the matrix
                self._slice(part, matrix, done, given)
                self._bytes += part.memory.nbytes
            done += part.shape[0]
            if self._bytes >= self.MOST:
                self._run()
        if done != given.shape[0]:
            raise ValueError(
                f"the parts of a matrix have {done} rows together, expected {given.shape[0]}"
            )
        return matrix

    def finish(self) -> Any:
        """All matrices are laid out when this returns.

        Raises:
            ValueError: a scale is not finite.
        """
        self._run()
        return self._answer

    def _slice(self, part: Part, matrix: PackedMatrix, first: int, whole: Stored) -> None:
        """Pieces of a part: threads that take one after the other end at about the same time."""
        kept = part.bits == whole.bits > 0
        through = not whole.bits and whole.dtype == "bfloat16" and part.source != "bfloat16"
        rows, scales = part.shape[0], part.group and part.shape[1] // part.group * 2
        # Rows that change places do so within a part.
        step = rows if part.heads else max(16, self.SLICE // max(1, part.row_bytes) // 16 * 16)
        memory, of_scales = c.address(part.memory), c.address(part.scales)
        for at in range(0, rows, max(1, step)):
            args = c.LayOutArgs(
                memory + at * part.row_bytes, part.row_bytes, matrix.struct,
                of_scales and of_scales + at * scales, c.SOURCES[part.source], part.group,
                first + at, min(step, rows - at), part.heads, through, kept,
            )  # fmt: skip
            self._waiting.append((part, args, matrix))

    def _run(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        meanwhile, self._meanwhile = self._meanwhile, None
        records = c.Records([("lay_out", args) for _, args, _ in waiting])
        failed: list[Exception] = []

        def work() -> None:
            try:
                self._pool.share_out(records)
            except Exception as error:  # of the other thread: raised in this one
                failed.append(error)

        if meanwhile is None:
            work()
        else:
            thread = threading.Thread(target=work)
            thread.start()
            try:
                self._answer = meanwhile()
            finally:
                thread.join()
        for error in failed:
            if isinstance(error, c.OperationError) and error.code == 2:
                raise ValueError(waiting[error.index][0].fault) from None
            raise error


def _room(given: Stored, kind: int, arena: Arena) -> PackedMatrix:
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
    matrix = c.Matrix(None, None, None, rows, cols, kind, group if integers else 0)
    data = arena.empty(c.loaded().size("matrix_bytes", matrix))
    scales, shifts = (
        arena.empty(2 * -(-rows // 16) * cols // group * 16).view(np.uint16) if wanted else None
        for wanted in (integers, given.shifted)
    )
    matrix.data, matrix.scales, matrix.shifts = (c.address(x) for x in (data, scales, shifts))
    return PackedMatrix(data, scales, shifts, matrix)


def pack(weight: Any, kind: int, pool: c.Pool) -> PackedMatrix:
    """Lay out weights; integers are quantised, 32 columns to a scale. Codes stay as they are.

    Args:
        weight: `[rows, cols]`, what `stored.of` takes: float32 or bfloat16, or codes.
        kind: FLOAT32, BFLOAT16, INT8 or INT4 of `cpu_library`; codes have their own.
        pool: threads that do it.

    Raises:
        ValueError: the columns do not fill the layout's units, or a scale is not finite.
    """
    layouts = Layouts(pool)
    matrix = layouts.add(weight, kind)
    layouts.finish()
    return matrix


def pack_model(
    spec: ModelSpec, weights: Weights, quant: str, pool: c.Pool,
    meanwhile: Callable[[], Any] | None = None,
) -> tuple[Weights, Any]:  # fmt: skip
    """All weights in one kind, norms and biases in float32. With "int4" and "ternary" embedding and
    head have 8 bits, and so have a layer's matrices that are not ternary. And what `meanwhile`
    returned (`Layouts`).

    Layers of `weights` are taken one by one; where they are read only then (`tensors.load`), both
    layouts are never held whole.

    Raises:
        ValueError: columns that the kind cannot have, or "ternary" where nothing is.
    """
    outer = c.INT8 if quant in ("int4", "ternary") else KINDS[quant]

    found, arena, layouts = 0, Arena(), Layouts(pool, meanwhile)

    def inner(x: Any) -> PackedMatrix | TernaryWeights:
        nonlocal found
        if quant != "ternary":
            return layouts.add(x, KINDS[quant], arena)
        packed = cpu_ternary.pack(x, pool)
        found += packed is not None
        return packed or layouts.add(x, c.INT8, arena)

    embedding = layouts.add(weights.embedding, outer, arena)
    head = embedding if spec.tie else layouts.add(weights.head, outer, arena)
    norm = stored.vector(weights.norm)
    weights.embedding = weights.head = None
    layers = [layer.mapped(inner, stored.vector) for layer in weights.layers]
    answer = layouts.finish()
    if quant == "ternary":
        check_found(found)
    return Weights(embedding, layers, norm, head), answer

"""Bytes that weights take in memory, known before they are read."""

from __future__ import annotations

from math import prod

from cpmcu.loader import Source
from cpmcu.spec import ModelSpec
from cpmcu.stored import Stored
from cpmcu.weights import Layer

# Bits of a weight, the scale of its group included: of 32, or of 128 where ternary (on a GPU in
# two bits instead of 1.6).
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8.5, "int4": 4.5, "ternary": 1.75}
_GPU_BITS = BITS | {"ternary": 2.125}


def outer(quant: str) -> str:
    """The kind of weights that embedding and head have: with int4 and ternary they have 8 bits."""
    return "int8" if quant in ("int4", "ternary") else quant


def of_spec(spec: ModelSpec, quant: str, *, gpu: bool = False) -> tuple[int, int]:
    """Bytes of all weights, and those of the embedding alone, all in one kind."""
    bits = _GPU_BITS if gpu else BITS
    table = spec.vocab * spec.hidden
    ends = table * (1 if spec.tie else 2)
    inner = spec.parameters - ends
    of_table = table * bits[outer(quant)] / 8
    return round(inner * bits[quant] / 8 + of_table * (1 if spec.tie else 2)), round(of_table)


def of_source(source: Source, quant: str, dtype: str, backend: str) -> tuple[int, int]:
    """The same for what a backend makes of a file: a matrix whose codes the CPU's kernels keep is
    counted in its own bits. Norms and biases are read.

    Raises:
        ValueError: the file is damaged or not of this model.
    """
    spec = source.spec
    kept = source.kind in ("gguf", "quantised") and quant == source.native_quant
    if backend != "cpu" or not kept:
        return of_spec(spec, quant, gpu=backend == "gpu")
    from cpmcu.tensors import load

    weights = load(source, dtype, codes=True, native=True)
    table = _bytes(weights.embedding, outer(quant))
    total = table + weights.norm.nbytes
    total += 0 if spec.tie else _bytes(weights.head, outer(quant))
    for layer in weights.layers:
        parts = [getattr(layer, name) for name in Layer.__slots__]
        total += sum(
            _bytes(part, quant) if isinstance(part, Stored) else part.nbytes
            for part in parts if part is not None
        )  # fmt: skip
    return round(total), round(table)


def _bytes(matrix: Stored, quant: str) -> float:
    bits = BITS[quant]
    if matrix.bits:
        bits = matrix.bits + 16 * (1 + matrix.shifted) / matrix.group
    return prod(matrix.shape) * bits / 8

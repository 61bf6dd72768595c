"""What the native decoder takes besides weights and cache: it is built over weights that hold
nothing, and what it laid out is counted. None of that memory is touched.
"""

from __future__ import annotations

import numpy as np

from cpmcu import cpu_library as c
from cpmcu.cpu_backend import Decoder
from cpmcu.cpu_weights import KINDS, PackedMatrix
from cpmcu.rounding import GROUP
from cpmcu.spec import ModelSpec
from cpmcu.weights import Layer, Weights


def activation_bytes(
    spec: ModelSpec, dtype: str, quant: str, threads: int, chunk: int, context: int
) -> int:
    """Bytes of intermediate values, of work space for each thread, of the angle tables and the
    logits of a token. Ternary weights count as int8 ones.

    Args:
        spec: the model.
        dtype: of keys and values.
        quant: weights in memory.
        threads: of the pool.
        chunk: tokens of a step, at most.
        context: tokens of the cache, at most.
    """
    pool = c.Pool(threads)
    decoder = Decoder(spec, _weights_of_nothing(spec, quant), dtype, pool, chunk, context)
    pool.close()
    tables = 2 * context * spec.head_dim * 4
    return decoder.activation_bytes + tables + spec.vocab * 4


def _weights_of_nothing(spec: ModelSpec, quant: str) -> Weights:
    nothing = np.empty(0)

    def matrix(rows: int, cols: int, kind: str) -> PackedMatrix:
        group = GROUP if kind in ("int8", "int4") else 0
        return PackedMatrix(
            nothing, None, None, c.Matrix(None, None, None, rows, cols, KINDS[kind], group)
        )

    inner = "int8" if quant == "ternary" else quant
    layer = Layer(
        attention_norm=nothing,
        qkv=matrix(spec.qkv_rows, spec.hidden, inner),
        output=matrix(spec.hidden, spec.heads * spec.head_dim, inner),
        ffn_norm=nothing,
        gate_up=matrix(2 * spec.ffn, spec.hidden, inner),
        down=matrix(spec.hidden, spec.ffn, inner),
    )
    outer = matrix(spec.vocab, spec.hidden, "int8" if quant in ("int4", "ternary") else quant)
    return Weights(outer, [layer], nothing, outer)  # one layer: all write to the same memory

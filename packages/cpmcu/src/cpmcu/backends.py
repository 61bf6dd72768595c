"""The backends, fastest first, and which one runs a model."""

from __future__ import annotations

import torch

from cpmcu import cpu_backend, cpu_library, cpu_ternary, plan, reference
from cpmcu.cpu_weights import pack_model
from cpmcu.loader import Source
from cpmcu.spec import ModelSpec
from cpmcu.weights import Weights

BACKENDS = {"cpu": cpu_backend, "reference": reference}
Decoder = cpu_backend.Decoder | reference.Decoder


def choose(backend: str, quant: str, spec: ModelSpec, dtype: torch.dtype) -> str:
    """The name of the backend that runs `spec`.

    Args:
        backend: a name, or "auto": the first that can.
        quant: weights in memory, or "auto".
        dtype: of the arithmetic.

    Raises:
        ValueError: the one asked for cannot, or none can.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reasons = []
    for name in BACKENDS if backend == "auto" else (backend,):
        supported, reason = BACKENDS[name].is_supported(spec, dtype)
        if name == "reference" and quant not in ("auto", str(dtype).removeprefix("torch.")):
            supported, reason = False, f"it has no {quant} weights"
        if name == "cpu" and supported and quant == "ternary":
            supported, reason = cpu_ternary.is_supported()
        if supported:
            return name
        reasons.append(f"backend {name!r} cannot run this model: {reason}")
    raise ValueError("; ".join(reasons))


def stored_quant(source: Source, backend: str, spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """The kind of weights that a file holds and the backend keeps as they are; None: neither."""
    if choose(backend, "auto", spec, dtype) != "cpu":
        return None
    if source.kind == "ternary":
        return "ternary" if cpu_ternary.is_supported()[0] else None
    return source.quant


def decoder(
    backend: str, quant: str, spec: ModelSpec, weights: Weights, threads: int, max_context: int
) -> Decoder:
    """The decoder of a chosen backend; the native one lays the weights out and lets them go."""
    if backend == "reference":
        return reference.Decoder(spec, weights)
    dtype, pool = weights.embedding.dtype, cpu_library.Pool(threads)
    packed = pack_model(spec, weights, quant, pool)
    cpu_library.give_back()
    return cpu_backend.Decoder(spec, packed, dtype, pool, plan.CHUNK, max_context)

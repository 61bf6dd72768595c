"""The backends, fastest first, and which one runs a model."""

from __future__ import annotations

import torch

from cpmcu import (
    cpu_backend,
    cpu_library,
    cpu_ternary,
    gpu_backend,
    gpu_device,
    gpu_weights,
    plan,
    reference,
)
from cpmcu.cpu_weights import pack_model
from cpmcu.loader import Source
from cpmcu.spec import ModelSpec
from cpmcu.weights import Weights

BACKENDS = {"gpu": gpu_backend, "cpu": cpu_backend, "reference": reference}
Decoder = gpu_backend.Decoder | cpu_backend.Decoder | reference.Decoder


def can_run(name: str, quant: str, spec: ModelSpec, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a backend runs a model with such weights, and why not."""
    supported, reason = BACKENDS[name].is_supported(spec, dtype)
    if not supported:
        return False, reason
    if name == "gpu":
        return gpu_backend.has_weights(quant, dtype)
    if name == "cpu":
        if quant == "float16":
            return False, "it has no float16 weights"
        return cpu_ternary.is_supported() if quant == "ternary" else (True, "")
    if quant not in ("auto", str(dtype).removeprefix("torch.")):
        return False, f"it has no {quant} weights"
    return True, ""


def choose(backend: str, quant: str, spec: ModelSpec, dtype: torch.dtype) -> str:
    """The name of the backend that runs `spec`.

    Args:
        backend: a name, or "auto": the first that can. That is the GPU only where there is one,
            never Triton's interpreter.
        quant: weights in memory, or "auto".
        dtype: of the arithmetic.

    Raises:
        ValueError: the one asked for cannot, or none can.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reasons = []
    for name in BACKENDS if backend == "auto" else (backend,):
        if backend == "auto" and name == "gpu" and not gpu_device.present():
            continue
        supported, reason = can_run(name, quant, spec, dtype)
        if supported:
            return name
        reasons.append(f"backend {name!r} cannot run this model: {reason}")
    raise ValueError("; ".join(reasons))


def resolve_dtype(
    dtype: str | torch.dtype, backend: str, quant: str, spec: ModelSpec
) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where a GPU will run `spec`, else `plan`'s choice.

    Raises:
        ValueError: unknown.
    """
    if dtype != "auto" or backend not in ("auto", "gpu") or not gpu_device.present():
        return plan.resolve_dtype(dtype)
    on_gpu = can_run("gpu", quant, spec, torch.bfloat16)[0]
    return torch.bfloat16 if on_gpu else plan.resolve_dtype(dtype)


def stored_quant(source: Source, backend: str, spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """The kind of weights that a file holds and the backend keeps as they are; None: neither."""
    name = choose(backend, "auto", spec, dtype)
    if name == "reference":
        return None
    if source.kind == "ternary":
        return "ternary" if can_run(name, "ternary", spec, dtype)[0] else None
    return source.quant


def decoder(
    backend: str, quant: str, spec: ModelSpec, weights: Weights, dtype: torch.dtype, threads: int,
    max_context: int,
) -> Decoder:  # fmt: skip
    """The decoder of a chosen backend; native ones lay the weights out and let them go."""
    if backend == "reference":
        return reference.Decoder(spec, weights)
    if backend == "gpu":
        device = gpu_device.required()
        laid_out = gpu_weights.pack_model(spec, weights, quant, dtype, device)
        return gpu_backend.Decoder(spec, laid_out, dtype, device)
    pool = cpu_library.Pool(threads)
    packed = pack_model(spec, weights, quant, pool)
    cpu_library.give_back()
    return cpu_backend.Decoder(spec, packed, dtype, pool, plan.CHUNK, max_context)

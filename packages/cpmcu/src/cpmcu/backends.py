"""The backends, fastest first, and which one runs a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from cpmcu import _torch, dtypes, gpu_device, plan
from cpmcu.loader import Source
from cpmcu.spec import ModelSpec
from cpmcu.weights import Weights

BACKENDS = ("gpu", "cpu", "reference")
Decoder = Any  # of one of their modules


@functools.cache
def module(name: str) -> Any:
    """A backend's module, imported when somebody asks for it: two of the three import PyTorch.

    Raises:
        ImportError: there is no PyTorch.
    """
    if name != "cpu" and not _torch.is_installed():
        raise ImportError(f"backend {name!r}: {_torch.MISSING}")
    return import_module({"reference": "cpmcu.reference"}.get(name, f"cpmcu.{name}_backend"))


def can_run(name: str, quant: str, spec: ModelSpec, dtype: str) -> tuple[bool, str]:
    """Whether a backend runs a model with such weights, and why not."""
    if name != "cpu" and not _torch.is_installed():
        return False, _torch.MISSING
    supported, reason = module(name).is_supported(spec, dtype)
    if not supported:
        return False, reason
    if name == "gpu":
        return module(name).has_weights(quant, dtype)
    if name == "cpu":
        from cpmcu import cpu_ternary

        if quant == "float16":
            return False, "it has no float16 weights"
        return cpu_ternary.is_supported() if quant == "ternary" else (True, "")
    if quant not in ("auto", dtypes.name_of(dtype)):
        return False, f"it has no {quant} weights"
    return True, ""


def choose(backend: str, quant: str, spec: ModelSpec, dtype: str) -> str:
    """The name of the backend that runs `spec`.

    Args:
        backend: a name, or "auto": the first that can. That is the GPU only where there is one,
            never Triton's interpreter.
        quant: weights in memory, or "auto".
        dtype: of the arithmetic.

    Raises:
        ValueError: the one asked for cannot, or none can.
        ImportError: the one asked for needs PyTorch, and there is none.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend != "auto":
        module(backend)
    reasons = []
    for name in BACKENDS if backend == "auto" else (backend,):
        if backend == "auto" and name == "gpu" and not gpu_device.present():
            continue
        supported, reason = can_run(name, quant, spec, dtype)
        if supported:
            return name
        reasons.append(f"backend {name!r} cannot run this model: {reason}")
    raise ValueError("; ".join(reasons))


def resolve_dtype(dtype: Any, backend: str, quant: str, spec: ModelSpec) -> str:
    """The name of the compute dtype; "auto" is bfloat16 where a GPU will run `spec`, else `plan`'s
    choice for the backend that will.

    Raises:
        ValueError: unknown.
    """
    automatic = isinstance(dtype, str) and dtype == "auto"
    if automatic and backend in ("auto", "gpu") and gpu_device.present():
        if can_run("gpu", quant, spec, "bfloat16")[0]:
            return "bfloat16"
    kernels = (
        automatic and backend in ("auto", "cpu") and can_run("cpu", quant, spec, "bfloat16")[0]
    )
    return plan.resolve_dtype(dtype, kernels)


def stored_quant(source: Source, backend: str, spec: ModelSpec, dtype: str) -> str | None:
    """The kind of weights that a file holds and the backend keeps as they are; None: neither."""
    name = choose(backend, "auto", spec, dtype)
    if name == "reference":
        return None
    if source.kind == "ternary":
        return "ternary" if can_run(name, "ternary", spec, dtype)[0] else None
    return source.native_quant if name == "cpu" else source.quant


def decoder(
    backend: str, quant: str, spec: ModelSpec, weights: Weights, dtype: str, threads: int,
    max_context: int, meanwhile: Callable[[], Any],
) -> tuple[Decoder, Any]:  # fmt: skip
    """The decoder of a chosen backend, and what `meanwhile` returned; native ones lay the weights
    out, with `meanwhile` beside it where they can, and let them go.
    """
    if backend == "reference":
        return module(backend).Decoder(spec, weights), meanwhile()
    if backend == "gpu":
        from cpmcu import gpu_weights

        device, kind = gpu_device.required(), getattr(_torch.torch, dtype)
        laid_out = gpu_weights.pack_model(spec, weights, quant, kind, device)
        return module(backend).Decoder(spec, laid_out, kind, device), meanwhile()
    from cpmcu import cpu_library, huge_pages
    from cpmcu.cpu_weights import pack_model

    pool = cpu_library.Pool(threads)
    packed, answer = pack_model(spec, weights, quant, pool, meanwhile)
    huge_pages.give_back()
    return module(backend).Decoder(spec, packed, dtype, pool, plan.CHUNK, max_context), answer

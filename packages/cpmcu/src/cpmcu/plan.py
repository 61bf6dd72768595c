"""What a model will need, from its headers alone: bytes, the longest context, the speed limit."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpmcu import _torch, cpu_library, dtypes, gpu_device, threads, weight_sizes
from cpmcu import sparse as sparse_attention
from cpmcu._torch import torch
from cpmcu.cache import bytes_read, cache_bytes
from cpmcu.loader import Source
from cpmcu.sparse import SparseAttention
from cpmcu.spec import ModelSpec

BACKENDS = ("auto", "gpu", "cpu", "reference")
CHUNK, GPU_CHUNK = 512, 2048  # tokens per prefill chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All sizes in bytes, lengths in tokens, bandwidth in bytes per second.

    `decode_bound` is the tokens per second that memory bandwidth allows at `context` tokens:
    every weight but the embedding table's unread rows is read once per token, and so is every
    key and value that attention visits. Real decoding is slower. `kv_bytes` has the compressed
    keys of sparse attention in it, `kv_bytes_per_token` has not. With `device` "gpu" all bytes,
    the limit and the bandwidth are the GPU's.
    """

    device: str
    model: str
    kind: str
    architecture: str
    dtype: str
    quant: str
    kv: str
    parameters: int
    file_bytes: int
    context: int
    model_context: int
    weight_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    total_bytes: int
    memory_limit: int
    largest_context: int
    bandwidth: float
    decode_bound: float

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON values."""
        return asdict(self)


def resolve_spec(spec: ModelSpec, sparse: str | SparseAttention, kv: str) -> ModelSpec:
    """The spec with what an engine chooses: sparse attention, and how keys and values are held.

    Raises:
        ValueError: unknown.
    """
    if kv not in ("auto", "int8"):
        raise ValueError(f"kv must be 'auto' or 'int8', got {kv!r}")
    found = sparse_attention.resolve(sparse, spec.sparse)
    return dataclasses.replace(spec, sparse=found, int8_cache=kv == "int8")


def resolve_dtype(name: Any, kernels: bool = False) -> str:
    """The name of the compute dtype: of a PyTorch dtype, of a name, or of "auto".

    "auto" is bf16, half the bytes per token, where it is not slower than fp32: where the processor
    multiplies it natively (AVX-512 BF16 or AMX), or `kernels` run the model with vectors (AVX2)
    that widen it on the way. PyTorch without native products takes six times as long for bf16.
    """
    if isinstance(name, str) and name == "auto":
        return "bfloat16" if native_bf16() or (kernels and cpu_library.vectors()) else "float32"
    dtype = dtypes.name_of(name)
    if dtype not in dtypes.FLOATS:
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {name!r}")
    return dtype


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16 numbers, by the kernels or by its own account."""
    library, _ = cpu_library.kernels()
    if library is not None:
        return library.level in ("avx512_bf16", "amx")
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


def resolve_quant(quant: str, dtype: str, stored: str | None = None) -> str:
    """The kind of weights in memory; "auto" is `stored`, that of the file, or else `dtype`.

    Raises:
        ValueError: unknown.
    """
    if quant not in ("auto", *weight_sizes.BITS):
        raise ValueError(
            f"quant must be one of {', '.join(('auto', *weight_sizes.BITS))}, got {quant!r}"
        )
    return (stored or dtypes.name_of(dtype)) if quant == "auto" else quant


def activation_bytes(spec: ModelSpec, dtype: str, context: int, quant: str, backend: str) -> int:
    """Peak bytes of one chunk's intermediate values, on top of weights and cache.

    On the CPU's native backend they are what it lays out. Elsewhere the widest moment is either the
    feed-forward's (gate and up, their product, the residual stream) or attention's (q, k, v,
    rotated copies, the chunk's mask as bool and as a number, which on a GPU the kernels do
    without); then come the fp32 logits of the last position and the angle tables.
    """
    if backend == "cpu":
        from cpmcu import cpu_memory

        return cpu_memory.activation_bytes(spec, dtype, quant, threads.default(), CHUNK, context)
    size = dtypes.size_of(dtype)
    tokens = min(GPU_CHUNK if backend == "gpu" else CHUNK, context)
    ffn = tokens * (4 * spec.ffn + 3 * spec.hidden) * size
    attention = tokens * (4 * spec.qkv_rows + 3 * spec.hidden) * size
    attention += 0 if backend == "gpu" else tokens * context * (1 + 4)
    tables = 2 * context * spec.head_dim * size
    return max(ffn, attention) + spec.vocab * (4 + size) + tables


def total_bytes(
    spec: ModelSpec, dtype: str, context: int, quant: str, backend: str, weights: int
) -> int:
    """`weights` bytes of weights, keys and values, and activations at `context` tokens."""
    values = activation_bytes(spec, dtype, context, quant, backend)
    return weights + cache_bytes(spec, dtype, context) + values


def largest_context(
    spec: ModelSpec, dtype: str, limit: int, quant: str, backend: str, weights: int
) -> int:
    """Most tokens, up to the model's own limit, whose `total_bytes` fit in `limit`; 0 if none."""
    low, high = 0, spec.max_context
    while low < high:  # total_bytes grows with the context
        middle = (low + high + 1) // 2
        if total_bytes(spec, dtype, middle, quant, backend, weights) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def check_context(wanted: int | None, spec: ModelSpec) -> int:
    """`wanted` tokens, or the model's limit for None; ValueError outside 1 .. that limit."""
    if wanted is None:
        return spec.max_context
    if not 1 <= wanted <= spec.max_context:
        limit = f"1..{spec.max_context} (the model's limit)"
        raise ValueError(f"max_context must be in {limit}, got {wanted}")
    return wanted


def fit_context(
    spec: ModelSpec, dtype: str, wanted: int | None, limit: int, quant: str, backend: str,
    weights: int,
) -> int:  # fmt: skip
    """`wanted` tokens, or as many as fit for None; ValueError where `limit` bytes are too few."""
    fits = largest_context(spec, dtype, limit, quant, backend, weights)
    if fits < (wanted or 1):
        need = total_bytes(spec, dtype, wanted or 1, quant, backend, weights)
        fix = f"lower max_context to {fits}" if fits else "raise it or take fewer bits (quant)"
        raise ValueError(
            f"memory_limit={limit} is too small: {wanted or 1} tokens of context need {need} "
            f"bytes; {fix}"
        )
    return wanted or fits


def available_memory() -> int:
    """Bytes the system can give without swapping."""
    import psutil

    return psutil.virtual_memory().available


def measure_bandwidth(megabytes: int = 256, seconds: float = 0.5, device: Any = "cpu") -> float:
    """Bytes per second this machine reads with PyTorch's threads, or a GPU from its own memory: the
    best of repeated sums.
    """
    data = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < stop:
        start = time.perf_counter()
        data.sum().item()  # waits for a GPU
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def make(
    path: str | Path,
    *,
    dtype: Any = "auto",
    quant: str = "auto",
    sparse: str | SparseAttention = "auto",
    kv: str = "auto",
    context: int | None = None,
    memory_limit: int | None = None,
    bandwidth: float | None = None,
    backend: str = "auto",
) -> Plan:
    """Plan the model at `path` without loading it.

    Args:
        path: model folder or .gguf file; only headers are read.
        dtype: "auto", "float32", "bfloat16" or "float16".
        quant: weights in memory, as in `Engine.from_pretrained`; so are `sparse` and `kv`.
        context: tokens to plan for; None takes the model's limit.
        memory_limit: bytes; None takes what is now available.
        bandwidth: bytes per second; None measures it for half a second.
        backend: "gpu" plans for a GPU, with `memory_limit` and `bandwidth` also for one that is not
            here; "auto" does where there is one.

    Raises:
        ValueError: `context` is outside 1 .. the model's limit, or another value is not positive;
            or there is no GPU to ask for what is not given.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    gpu = backend == "gpu" or (backend == "auto" and gpu_device.present())
    if gpu and not gpu_device.present() and None in (memory_limit, bandwidth):
        raise ValueError(
            "to plan for a GPU that is not here, give memory_limit (--memory-limit) and bandwidth "
            "(--bandwidth)"
        )
    source = Source(path)
    spec = resolve_spec(source.spec, sparse, kv)
    runs = "gpu" if gpu else "reference"
    if not gpu and backend != "reference":
        from cpmcu import cpu_backend

        runs = "cpu" if cpu_backend.is_supported(spec, "bfloat16")[0] else runs
    compute = "bfloat16" if gpu and dtype == "auto" else resolve_dtype(dtype, runs == "cpu")
    stored = source.native_quant if runs == "cpu" else source.quant
    quant = resolve_quant(quant, compute, "ternary" if source.kind == "ternary" else stored)
    context = spec.max_context if context is None else context
    if not 1 <= context <= spec.max_context:
        raise ValueError(
            f"context must be in 1..{spec.max_context} (the model's limit), got {context}"
        )
    for name, value in (("memory_limit", memory_limit), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    limit, speed = memory_limit, bandwidth
    if speed is None and not _torch.is_installed():
        raise ValueError("without PyTorch bandwidth is not measured: give it (--bandwidth 30G)")
    if limit is None:
        limit = gpu_device.free_memory() if gpu else available_memory()
    if speed is None:
        speed = measure_bandwidth(2048, device="cuda") if gpu else measure_bandwidth()
    kv = cache_bytes(spec, compute, context)
    weights, table = weight_sizes.of_source(source, quant, compute, runs)
    # An untied model reads one row of its embedding table, not the table.
    read = weights - (0 if spec.tie else table)
    return Plan(
        device="gpu" if gpu else "cpu",
        model=str(path),
        kind=source.kind,
        architecture=spec.architecture,
        dtype=compute,
        quant=quant,
        kv="int8" if spec.int8_cache else compute,
        parameters=spec.parameters,
        file_bytes=source.file_bytes,
        context=context,
        model_context=spec.max_context,
        weight_bytes=weights,
        kv_bytes=kv,
        kv_bytes_per_token=cache_bytes(dataclasses.replace(spec, sparse=None), compute, 1),
        activation_bytes=activation_bytes(spec, compute, context, quant, runs),
        total_bytes=total_bytes(spec, compute, context, quant, runs, weights),
        memory_limit=limit,
        largest_context=largest_context(spec, compute, limit, quant, runs, weights),
        bandwidth=speed,
        decode_bound=speed / (read + bytes_read(spec, compute, context)),
    )

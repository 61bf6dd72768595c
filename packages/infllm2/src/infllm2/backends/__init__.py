"""The backends, what each can run, and how one is chosen.

A backend is a module-like object with `select` and `attend`, and `is_supported(inputs)`, which
answers with a reason. `backend="auto"` takes the first of `ORDER` that can run and logs its choice
once; a backend asked for by name runs or raises. It may also have, for calls without gradient:

- `run(q, k, v, fine, coarse, config, scale) -> (out, blocks)`: both steps in one;
- `dense(q, k, v, scale) -> out`: causal attention of the last T of S positions;
- `decode(q, k, v, fine, coarse, keys, config) -> out`: both steps for one token (T = 1), the last
  of `keys` keys, integer [1] on the GPU, in launches that are the same for any number of them, as a
  CUDA graph needs. k and v `[B, K, S, D]`, fine and coarse have room for S keys;
- `step(store, q, config, backend, dense_below)`: an object with `fits` and `run`, which decodes the
  next tokens of a cache (see `cpu_decode.py`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infllm2.config import InfLLMv2Config

logger = logging.getLogger("infllm2")

# Fastest first.
ORDER = ("cpu", "triton", "torch", "reference")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Inputs:
    """What a backend needs to know to say whether it can run: no values, only kinds and sizes."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Inputs:
        """Describe q `[B, H, T, D]` and k `[B, K, S, D]`."""
        return cls(q.device.type, q.dtype, q.shape[1], k.shape[1], q.shape[3])


class Backend(Protocol):
    """One implementation of both steps."""

    def is_supported(self, inputs: Inputs) -> tuple[bool, str]:
        """Whether it can run on such inputs, and if not, why ("" otherwise)."""
        ...

    def select(
        self, q: Tensor, fine: Tensor, coarse: Tensor, length: int, config: InfLLMv2Config
    ) -> Tensor:
        """Blocks to visit, int32 `[B, K, T, config.budget]`; see `infllm2.select_blocks`.

        Args:
            q: `[B, H, T, D]`, the last T of `length` positions.
            fine: all complete fine kernels `[B, K, J, D]` in q's dtype, any strides.
            coarse: all complete coarse ones.
            length: number of keys.
            config: sizes and budget.
        """
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, H, T, D]` and log-sum-exp `[B, H, T]`; see `block_sparse_attention`."""
        ...


class Absent:
    """Stands for a backend whose module cannot be imported here.

    Args:
        reason: why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def is_supported(self, inputs: Inputs) -> tuple[bool, str]:
        """Never, and why."""
        return False, self.reason


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ORDER:
        raise ValueError(f"backend must be one of {('auto', *ORDER)}, got {name!r}")
    try:
        return importlib.import_module(f"infllm2.backends.{name}_backend").BACKEND
    except ImportError as error:
        return Absent(f"{error}")


@functools.lru_cache(256)
def choose(name: str, inputs: Inputs) -> Backend:
    """The backend to run on such inputs.

    Raises:
        ValueError: unknown name, the named backend cannot run these inputs, or none can.
    """
    if name != "auto":
        backend = get(name)
        supported, reason = backend.is_supported(inputs)
        if not supported:
            raise ValueError(f"backend={name!r} cannot run these inputs: {reason}")
        return backend
    reasons = []
    for candidate in ORDER:
        backend = get(candidate)
        supported, reason = backend.is_supported(inputs)
        if supported:
            skipped = f" (not {'; '.join(reasons)})" if reasons else ""
            logger.info("backend=auto runs %r on %s%s", candidate, inputs, skipped)
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no backend can run these inputs ({'; '.join(reasons)})")

"""The backends, what each can run, and how one is chosen.

A backend is a module-like object with `select` and `attend`, and `is_supported(inputs)`, which
answers with a reason. `backend="auto"` takes the first of `ORDER` that can run and logs its choice
once; a backend asked for by name runs or raises.
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
ORDER = ("torch", "reference")

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

    def select(self, q: Tensor, k: Tensor, config: InfLLMv2Config) -> Tensor:
        """Blocks to visit, int32 `[B, K, T, config.budget]`; see `infllm2.select_blocks`."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, H, T, D]` and log-sum-exp `[B, H, T]`; see `block_sparse_attention`."""
        ...


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ORDER:
        raise ValueError(f"backend must be one of {('auto', *ORDER)}, got {name!r}")
    return importlib.import_module(f"infllm2.backends.{name}_backend").BACKEND


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
            _log_once(candidate, "; ".join(reasons))
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no backend can run these inputs ({'; '.join(reasons)})")


@functools.cache
def _log_once(name: str, skipped: str) -> None:
    logger.info("backend=auto runs %r%s", name, f" (not {skipped})" if skipped else "")

"""Does every backend give what the reference gives, on this machine?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infllm2 import backends, reference
from infllm2.attention import block_sparse_attention
from infllm2.config import InfLLMv2Config
from infllm2.selection import compressed, select_blocks

# Largest difference allowed from the float64 reference on inputs of order one, by dtype of the
# inputs: a few rounding steps of that dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Check:
    """One backend with one dtype.

    Attributes:
        backend: its name.
        dtype: name of the inputs' dtype.
        available: whether it can run here.
        reason: why not, "" if it can.
        same_blocks: whether its sets equal the reference's on the same inputs.
        error: largest absolute difference of outputs from the float64 reference.
        tolerance: what is allowed.
    """

    backend: str
    dtype: str
    available: bool
    reason: str
    same_blocks: bool
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it ran and was right."""
        return self.available and self.same_blocks and self.error <= self.tolerance


def check_backends(seed: int = 0) -> list[Check]:
    """Run every backend on random inputs of every dtype, in prefill and decode."""
    return [
        _check(name, dtype, tolerance, seed)
        for name in backends.ORDER
        for dtype, tolerance in TOLERANCE.items()
    ]


def _check(name: str, dtype: torch.dtype, tolerance: float, seed: int) -> Check:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, 700, 40, generator=generator).to(dtype) for heads in (6, 2, 2))
    kind = str(dtype).removeprefix("torch.")
    available, reason = backends.get(name).is_supported(backends.Inputs.of(q, k))
    if not available:
        return Check(name, kind, False, reason, False, float("nan"), tolerance)
    config = InfLLMv2Config(
        kernel_size=16, kernel_stride=8, block_size=32, window_size=128, topk=4, dense_len=-1
    )
    # The sets are compared on equal numbers: the reference sees the same rounded inputs.
    keys = compressed(k, config)
    expected = reference.select_blocks(
        q.double(), keys.fine.double(), keys.coarse.double(), keys.length, config
    )
    truth = block_sparse_attention(
        q.double(), k.double(), v.double(), expected, block_size=32, backend="reference"
    )
    same, error = True, 0.0
    for queries in (700, 1):
        part = q[:, :, -queries:]
        blocks = select_blocks(part, k, config, backend=name)
        same = same and torch.equal(blocks, expected[:, :, -queries:])
        out = block_sparse_attention(
            part, k, v, expected[:, :, -queries:], block_size=32, backend=name
        )
        error = max(error, float((out.double() - truth[:, :, -queries:]).abs().max()))
    return Check(name, kind, True, "", same, error, tolerance)

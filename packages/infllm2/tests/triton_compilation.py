"""Compiles the Triton kernels for GPUs that are not here, run by test_triton_compile.py.

Whatever the backend would launch is compiled down to machine code instead, with the arguments it
has: triton's own wheel brings the assembler. Prints one JSON line per kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from infllm2 import InfLLMv2Config
from infllm2.backends import triton_backend
from testbed import triton_without_gpu


def main(capability: int, problems: list[list[Any]]) -> None:
    """Compile everything that problems (group size, head size, dtype, tokens) launch."""
    triton_backend.is_roomy = lambda _: capability >= 90
    triton_without_gpu.compile_only(
        capability, lambda line: print(json.dumps({**line, "problem": problem}), flush=True)
    )
    config = InfLLMv2Config(topk=16, window_size=512, dense_len=-1)
    S = 4096
    for problem in problems:
        G, D, dtype, T = problem
        make = lambda heads, n: torch.zeros(1, heads, n, D, dtype=getattr(torch, dtype))  # noqa: B023, E731
        q, k, v = make(G, T), make(1, S), make(1, S)
        triton_backend.BACKEND.select(q, make(1, S // 16 - 1), make(1, S // 64 - 1), S, config)
        blocks = torch.full((1, 1, T, config.budget), -1, dtype=torch.int32)
        leaves = [x.requires_grad_(T > 1) for x in (q, k, v)]
        out, _ = triton_backend.BACKEND.attend(*leaves, blocks, block_size=64, scale=0.1)
        if T == 1:
            fine, coarse = make(1, S // 16 - 1), make(1, S // 64 - 1)
            keys = torch.ones(1, dtype=torch.int64)
            triton_backend.BACKEND.decode(q, k, v, fine, coarse, keys, config)
        if T > 1:
            torch.autograd.grad(out, leaves, torch.zeros_like(out))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), json.loads(sys.argv[2]))

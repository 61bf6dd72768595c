"""Compiles the Triton kernels for GPUs that are not here, run by test_triton_compile.py.

Whatever the backend would launch is compiled down to machine code instead, with the arguments it
has: triton's own wheel brings the assembler. Prints one JSON line per kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from infllm2 import InfLLMv2Config
from infllm2.backends import triton_backend

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class NoGPU:
    """Stands for the driver of a GPU: triton asks it what to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> dict[str, int]:
    """Registers, bytes of shared memory and of stack (spilled registers), and what is used."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "async_copies": kernel.asm["ptx"].count("cp.async.c"),
    }


def main(capability: int, problems: list[list[Any]]) -> None:
    """Compile everything that problems (group size, head size, dtype, tokens) launch."""
    driver.set_active(NoGPU(capability))
    triton_backend.is_roomy = lambda _: capability >= 90
    run, seen = JITFunction.run, set()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **sizes: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **sizes)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            line = {"kernel": self.__name__, "problem": problem, **resources(kernel)}
            print(json.dumps(line), flush=True)

    JITFunction.run = compile_only
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
        if T > 1:
            torch.autograd.grad(out, leaves, torch.zeros_like(out))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), json.loads(sys.argv[2]))

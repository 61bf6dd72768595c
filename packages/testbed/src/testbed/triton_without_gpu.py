"""Triton kernels without a GPU: run in the interpreter as a GPU would, and compiled for one.

For tests. Nothing here imports Triton before it is called.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def start_interpreter() -> None:
    """Make this process one where kernels run in the interpreter, with a GPU's bfloat16.

    NumPy has no bfloat16, so the interpreter keeps its bits in uint16: `tl.dot` multiplies those
    as integers, and rounding from float32 drops bits instead of going to the nearest. Both are
    replaced here by what a GPU does. PyTorch uses one thread from here on.

    Raises:
        RuntimeError: Triton was imported before.
    """
    if "triton" in sys.modules:
        raise RuntimeError("too late to ask for the interpreter: triton is imported already")
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    np.seterr(all="ignore")  # infinities and their differences are part of the algorithms

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        return TensorHandle(
            np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data, d.dtype.scalar
        )

    cast = InterpreterBuilder.cast_impl

    def round_to_nearest(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        rounded = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), to.scalar)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = round_to_nearest
    InterpreterBuilder.create_fp_trunc = round_to_nearest


@contextlib.contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """A process that has the interpreter: yields `run(check, *args)`, which calls check("cpu",
    *args) there.

    In a process of its own, for there Triton is imported anew, and a backend that would choose
    these kernels for CPU tensors as soon as the interpreter is on does so nowhere else.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start_interpreter) as pool:
        yield lambda check, *args: pool.submit(check, "cpu", *args).result()


def compile_only(capability: int, report: Callable[[dict[str, Any]], None]) -> None:
    """From here on, in this process, launches compile for a GPU instead of running on one.

    With the arguments and sizes that the launch has; Triton's own wheel brings the assembler.

    Args:
        capability: such as 80 or 90.
        report: called once for each machine code, with the kernel's name, registers, bytes of
            stack ("spilled") and shared memory, and how many matrix instructions and asynchronous
            copies it has.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoGPU:
        """Stands for the driver of a GPU: Triton asks it what to compile for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NoGPU())
    run, seen = JITFunction.run, set()

    def compile_instead(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **sizes: Any
    ) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **sizes)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            report({"kernel": self.__name__, **_resources(kernel)})

    JITFunction.run = compile_instead


def _resources(kernel: Any) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
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

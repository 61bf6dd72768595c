"""The GPU backend's kernels compiled for sm80 and sm90, without a GPU: no spills, within memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "gpu_compilation.py"
# Shared memory that one program may have; sm80's code also runs on sm86 and sm89, which have 99 KB.
SHARED = {80: 99 << 10, 90: 227 << 10}
KERNELS = {
    *("vector_kernel", "matrix_kernel", "merge_kernel", "part_kernel", "compress_kernel"),
    *("rotate_kernel", "add_norm_kernel", "gate_kernel"),
}


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile(capability):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(PROGRAM), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "Cannot find" in done.stderr:  # this wheel of triton has no assembler
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["shared"] <= SHARED[capability], kernel
        if kernel["kernel"] in ("matrix_kernel", "part_kernel"):
            assert kernel["async_copies"] and kernel["mma"] + kernel["wgmma"], kernel

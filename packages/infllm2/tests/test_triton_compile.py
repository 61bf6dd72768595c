"""The Triton kernels compiled for sm80 and sm90, without a GPU: no spills, within shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "triton_compilation.py"
KERNELS = {
    *("choose_kernel", "lse_kernel", "score_kernel", "merge_kernel", "forward_kernel"),
    *("merge_parts_kernel", "queries_kernel", "keys_kernel"),
}
# Shared memory that one program may have (CUDA programming guide, compute capabilities). On sm80
# that is 163 KiB, but its code also runs on sm86, sm89 and sm120, which have 99.
SHARED = {80: 99 << 10, 90: 227 << 10}
LONG, ONE = 512, 1  # tokens: prefill and backward; decoding


def compiled(capability: int, problems: list[tuple[int, int, str, int]]) -> list[dict[str, Any]]:
    """In a process of its own, which thinks it has such a GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(PROGRAM), str(capability), json.dumps(problems)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "Cannot find" in done.stderr:  # this wheel of triton has no assembler
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED)
def test_trained_shapes(capability: int) -> None:
    """MiniCPM4-8B's groups of 16 at head size 128: no spills, matrix units, and loads ahead."""
    kernels = compiled(capability, [(16, 128, "bfloat16", LONG), (16, 128, "bfloat16", ONE)])
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["shared"] <= SHARED[capability], kernel
        if kernel["kernel"] not in ("choose_kernel", "merge_kernel", "merge_parts_kernel"):
            assert kernel["async_copies"], kernel
            units = "wgmma" if capability == 90 and kernel["problem"][3] == LONG else "mma"
            assert kernel[units], kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "problems"),
    [
        (90, [(2, 64, "bfloat16", LONG), (16, 128, "float32", LONG)]),
        (80, [(17, 96, "float16", LONG), (32, 256, "bfloat16", LONG), (64, 64, "float32", ONE)]),
    ],
)
def test_other_shapes(capability: int, problems: list[tuple[int, int, str, int]]) -> None:
    """Where tiles differ: small groups, padding, the largest heads, float32."""
    for kernel in compiled(capability, problems):
        # A few bytes at the odd shapes, of the 255 registers a thread can have.
        assert kernel["spilled"] <= 32 and kernel["shared"] <= SHARED[capability], kernel

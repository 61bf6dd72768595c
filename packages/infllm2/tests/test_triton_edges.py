"""Rare inputs to the Triton kernels, and real sizes on a GPU; checks as in test_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_edge_checks

from infllm2 import backends

CHECKS = ("chunks", "ties", "not_finite", "written_whole", "nothing_to_do", "as_pytorch_asks")


@pytest.mark.parametrize("name", CHECKS)
def test_edge(run: Callable[..., Any], name: str) -> None:
    run(getattr(triton_edge_checks, name))


def test_cpu_tensors_never_come_here_by_themselves() -> None:
    """Not even in a dtype that the CPU kernels do not know."""
    inputs = backends.Inputs("cpu", torch.float16, 4, 2, 64)
    triton = backends.get("triton")
    assert backends.choose("auto", inputs) is not triton
    with pytest.raises(ValueError, match="it runs on GPUs"):
        backends.choose("triton", inputs)

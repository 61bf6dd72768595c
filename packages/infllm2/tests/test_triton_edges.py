"""Rare inputs to the Triton kernels, and real sizes on a GPU; checks as in test_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_edge_checks

from infllm2 import InfLLMv2Config, backends, reference
from infllm2.compression import compress_keys

CHECKS = (
    "chunks",
    "ties",
    "not_finite",
    "written_whole",
    "nothing_to_do",
    "as_pytorch_asks",
    "length_on_the_gpu",
)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("G", "D"), [(16, 128), (8, 64)])
def test_long_prompts_on_a_gpu(G: int, D: int) -> None:
    """128K tokens as MiniCPM4 has them: the last rows are right, and little memory is needed."""
    S, config = 131072, InfLLMv2Config(dense_len=-1)
    triton, scale = backends.get("triton"), D**-0.5
    try:
        q, k, v = (
            torch.randn(1, h, S, D, device="cuda", dtype=torch.bfloat16) for h in (2 * G, 2, 2)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        blocks = triton.select(q.detach(), *compress_keys(k.detach(), config), S, config)
        out, lse = triton.attend(*leaves, blocks, block_size=64, scale=scale)
        mine = out.nbytes + lse.nbytes
        assert torch.cuda.max_memory_allocated() - before - mine < 300 << 20
        forward = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(out, leaves, q.detach())
        results = sum(x.nbytes for x in grads)
        assert torch.cuda.max_memory_allocated() - forward - results < 300 << 20
    except torch.OutOfMemoryError:
        pytest.skip("the tensors alone do not fit into this GPU's memory")
    rows = (q[:, :, -2:], k, v)
    tail = [x.detach().float().requires_grad_() for x in rows]
    truth, _ = reference.block_sparse_attention(
        *tail, blocks[:, :, -2:], block_size=64, scale=scale
    )
    torch.testing.assert_close(out[:, :, -2:].float(), truth, atol=2e-2, rtol=2e-2)
    (dq,) = torch.autograd.grad(truth, tail[:1], tail[0].detach())
    torch.testing.assert_close(grads[0][:, :, -2:].float(), dq, atol=2e-2, rtol=2e-2)

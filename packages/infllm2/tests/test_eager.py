"""What PyTorch wraps around a call: autocast, compilation, transforms, modes, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from infllm2 import InfLLMv2Config, block_sparse_attention, infllmv2_attention, select_blocks

BACKENDS = ("reference", "torch", "cpu")  # cpu is skipped where it was not built


def gradients(tensors: tuple[Tensor, ...], run: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    run(*leaves).float().pow(2).sum().backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 200])
def test_autocast_is_a_cast_of_the_inputs_and_nothing_more(
    backend: str, T: int, small: InfLLMv2Config, randn: Callable
) -> None:
    tensors = randn(200, T=T)
    narrow = tuple(x.bfloat16() for x in tensors)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return infllmv2_attention(q, k, v, small, backend=backend)

    expected = run(*narrow)
    blocks = select_blocks(*narrow[:2], small, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(*tensors), expected)
        assert torch.equal(run(*tensors[:2], narrow[2]), expected)  # as rotary embedding leaves it
        assert torch.equal(select_blocks(*tensors[:2], small, backend=backend), blocks)
        out = block_sparse_attention(*tensors, blocks, block_size=16, backend=backend)
        assert torch.equal(out, expected)
        inside = gradients(tensors, run)
        double = run(*(x.double() for x in tensors)) if backend != "cpu" else None
    assert double is None or double.dtype == torch.float64
    for got, wanted in zip(inside, gradients(narrow, run), strict=True):
        assert got.dtype == torch.float32
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted.float(), rtol=0, atol=0.02 * scale)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_around_a_call(
    backend: str, small: InfLLMv2Config, randn: Callable, compiler: None
) -> None:
    tensors = randn(200)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return infllmv2_attention(q * 2, k, v, small, backend=backend) + 1

    compiled = torch.compile(around, backend=count)
    assert torch.equal(compiled(*tensors), around(*tensors))
    assert len(graphs) == 2  # what is before and what is after; nothing of ours in between
    for got, wanted in zip(gradients(tensors, compiled), gradients(tensors, around), strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda *x: around(*x) * 3, backend=count, fullgraph=True)(*tensors)


def test_transforms_go_through_the_reference(small: InfLLMv2Config, randn: Callable) -> None:
    q, k, v = randn(120)

    def loss(q: Tensor, backend: str = "reference") -> Tensor:
        return infllmv2_attention(q, k, v, small, backend=backend).pow(2).sum()

    expected = gradients((q, k, v), lambda q, k, v: infllmv2_attention(q, k, v, small))[0]
    torch.testing.assert_close(torch.func.grad(loss)(q), expected, rtol=1e-4, atol=1e-4)
    rows = torch.randn(3, *q.shape)
    each = torch.func.vmap(loss)(rows)
    torch.testing.assert_close(each, torch.stack([loss(row) for row in rows]))

    def of_all(*leaves: Tensor) -> Tensor:
        return infllmv2_attention(*leaves, small, backend="reference").pow(2).sum()

    got = torch.func.grad(of_all, argnums=(0, 1, 2))(q, k, v)
    for mine, wanted in zip(got, gradients((q, k, v), of_all), strict=True):
        torch.testing.assert_close(mine * 2 * of_all(q, k, v), wanted, rtol=1e-4, atol=1e-2)
    for backend in ("auto", "torch"):
        message = f"got backend='{backend}': pass backend=\"reference\""
        with pytest.raises(ValueError, match=message):
            torch.func.grad(loss)(q, backend)
        with pytest.raises(ValueError, match=message):
            torch.func.vmap(lambda q, b=backend: loss(q, b))(rows)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(ValueError, match=message):
                loss(dual, backend)
            loss(q, backend)  # nothing of it is in the way of other tensors


def test_a_second_derivative_is_refused_not_wrong(small: InfLLMv2Config, randn: Callable) -> None:
    """Even where the loss is linear in the output, which `once_differentiable` does not notice."""
    q, k, v = (x.double().requires_grad_() for x in randn(120))
    out = infllmv2_attention(q, k, v, small, backend="torch").sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out, q, create_graph=True)
    out = infllmv2_attention(q, k, v, small, backend="reference").sum()
    (first,) = torch.autograd.grad(out, q, create_graph=True)
    assert torch.autograd.grad(first.pow(2).sum(), k)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_without_gradient(backend: str, small: InfLLMv2Config, randn: Callable) -> None:
    q, k, v = randn(200)
    expected = infllmv2_attention(q, k, v, small, backend=backend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        got = infllmv2_attention(*leaves, small, backend=backend)
    assert torch.equal(got, expected) and not got.requires_grad
    with torch.inference_mode():
        inside = infllmv2_attention(*(x.clone() for x in leaves), small, backend=backend)
    assert torch.equal(inside, expected)
    for i in range(3):  # a gradient for one of them alone
        some = [x.detach().clone().requires_grad_(i == j) for j, x in enumerate(leaves)]
        infllmv2_attention(*some, small, backend=backend).sum().backward()
        assert [x.grad is not None for x in some] == [i == j for j in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_written_whole(backend: str, small: InfLLMv2Config, randn: Callable) -> None:
    """PyTorch fills what it hands out unwritten with NaN, or the largest integer."""
    tensors = randn(203, B=2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return infllmv2_attention(q, k, v, small, backend=backend)

    def all_of_it() -> list[Tensor]:
        q, k, v = tensors
        blocks = select_blocks(q, k, small, backend=backend)
        out, lse = block_sparse_attention(
            q, k, v, blocks, block_size=16, backend=backend, return_lse=True
        )
        few = [run(q[:, :, -n:], k, v) for n in (1, 3)]
        return [blocks, out, lse, run(q, k, v), *few, *gradients(tensors, run)]

    clean = all_of_it()
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
        poisoned = all_of_it()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_of_python_do_not_share_memory(
    backend: str, small: InfLLMv2Config, randn: Callable
) -> None:
    """Different shapes at once, forward and backward: scratch memory is a thread's own."""
    problems = [randn(S, D=D) for S, D in ((150, 16), (301, 32), (77, 8), (220, 48))]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return infllmv2_attention(q, k, v, small, backend=backend)

    expected = [(run(*p), gradients(p, run)) for p in problems]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(12):
            out, grads = run(*problems[i]), gradients(problems[i], run)
            same = torch.allclose(out, expected[i][0], atol=1e-5)
            if not all([same, *map(torch.allclose, grads, expected[i][1], [1e-4] * 3, [1e-4] * 3)]):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

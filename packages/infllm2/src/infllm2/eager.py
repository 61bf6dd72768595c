"""What PyTorch may wrap around a call (compilation, mixed precision, function transforms), and what
becomes of it: attention runs eagerly, in one dtype, and has first derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that `torch.compile` runs as it is, between two graphs.

    `torch.compiler.disable` alone would do, but it imports the compiler when it decorates.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            reason = "infllm2 attention runs eagerly: compile without fullgraph=True"
            return torch.compiler.disable(function, reason=reason)(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is the queries.

    - It is `uncompiled`.
    - Inside `torch.autocast` its floating-point tensors get autocast's dtype (float64 stays), as
      those of PyTorch's own attention do, and nothing inside is cast again: block scores are sums
      in float32, whatever surrounds them.
    - `torch.func` transforms and forward-mode derivatives need `backend="reference"`.

    Raises:
        ValueError: (when called) a transform with another backend.
    """

    @uncompiled
    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._functorch.peek_interpreter_stack() or forward_ad._current_level >= 0:
            _refuse_transforms(args, kwargs)
        q = args[0] if args else kwargs.get("q")
        kind = q.device.type if isinstance(q, Tensor) else "cpu"
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return function(
                *(_cast(x, dtype) for x in args), **{n: _cast(x, dtype) for n, x in kwargs.items()}
            )

    return run


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `backward` of an autograd function that cannot be differentiated again.

    Unlike `once_differentiable`, which lets `create_graph=True` pass and drops the dependence on
    the inputs. Nothing inside is cast by a surrounding `torch.autocast`.

    Raises:
        RuntimeError: (when called) a graph of the gradients is asked for.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "infllm2 attention has no second derivative, which create_graph=True asks for: use "
                'backend="reference", which has'
            )
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return run


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
    return tuple(_cast(y, dtype) for y in x) if type(x) is tuple else x


def _refuse_transforms(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Only the reference is made of operations that PyTorch can transform."""
    if kwargs.get("backend") == "reference":
        return
    # Inside of a transform every new tensor is a wrapper, of no address: kernels could not run.
    if torch._C._functorch.peek_interpreter_stack() or any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
        for x in (*args, *kwargs.values())
    ):
        raise ValueError(
            "torch.func transforms and forward-mode derivatives go through the reference only, "
            f'got backend={kwargs.get("backend", "auto")!r}: pass backend="reference"'
        )

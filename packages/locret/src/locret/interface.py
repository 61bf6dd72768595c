"""The seam to transformers: every attention call of a decoder, with what Locret needs to know.

No model code is patched: attention is exchanged through transformers' attention interface, and
hooks on the attention modules tell the layer's input, rotation and cache. All is undone on exit.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from locret._attention import check_options, exchanged_attention, named_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "locret"


@dataclass
class Call:
    """One attention call of one layer.

    Attributes:
        module: the attention module.
        layer: its number.
        q: `[B, H, T, D]`, after RoPE.
        k, v: `[B, J, S, D]`, after RoPE, as the cache gave them; the last T are this call's.
        hidden: `[B, T, hidden_size]`, the attention's input, after its norm.
        rotation: (cos, sin), each `[B or 1, T, D]`, that this call's q and k were rotated with.
        cache: `past_key_values`, or None.
        scaling: what q · k is multiplied by.
    """

    module: torch.nn.Module
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]
    cache: Any
    scaling: float

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """This call's q `[B, H, T, D]` and k `[B, J, T, D]` as they were before RoPE."""
        cos, sin = self.rotation
        k = self.k[:, :, self.k.shape[2] - self.q.shape[2] :]
        # Long-context variants scale both cos and sin, so the inverse divides by the square.
        scale = (cos[..., :1] ** 2 + sin[..., :1] ** 2).unsqueeze(1)
        q, k = rotate(self.module, self.q, k, cos, -sin)
        return q / scale, k / scale


Rotation = tuple[Tensor, Tensor]
Attend = Callable[[Call], Tensor]
# What attention modules call their input, (cos, sin) and cache: transformers, MiniCPM4.
_NAMES = (
    ("hidden_states", "x"), ("position_embeddings", "cos_sin"), ("past_key_values",)
)  # fmt: skip
# Open sessions by id of the model's configuration: what to do with a call. The dict holds
# what the hook of the layer that is running learned.
_open: dict[int, tuple[Attend, dict[str, Any], Any]] = {}


def rotate(
    module: torch.nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RoPE as this architecture applies it: q, k `[B, H, T, D]`; cos, sin `[B, T, D]`."""
    names = vars(sys.modules[type(module).__module__])
    if "apply_rotary_pos_emb" in names:
        return names["apply_rotary_pos_emb"](q, k, cos, sin)
    if "rotate" in names:  # MiniCPM4: one tensor at a time
        return names["rotate"](q, cos, sin), names["rotate"](k, cos, sin)
    raise ValueError(f"{type(module).__name__} has no rotary embedding, which locret needs")


def rotary_of(model: PreTrainedModel) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The model's own `(tensor for dtype and device, int positions [N, T]) -> (cos, sin)`.

    Raises:
        ValueError: the model has none.
    """
    owner = next((m for m in model.modules() if hasattr(m, "rotary_emb")), None)
    if owner is None:
        raise ValueError(f"{type(model).__name__} has no rotary embedding, which locret needs")
    rotary = owner.rotary_emb
    if next(iter(inspect.signature(rotary.forward).parameters)) == "positions":  # MiniCPM4
        return lambda like, positions: rotary(positions, like.dtype)
    return lambda like, positions: rotary(like, positions)


@contextmanager
def exchanged(
    model: PreTrainedModel,
    attend: Attend,
    enter: Callable[[torch.nn.Module, Tensor, Rotation, Any], Rotation] | None = None,
) -> Iterator[None]:
    """Let `attend` compute every attention of the model inside the block.

    Args:
        model: a transformers decoder.
        attend: from a `Call` to `[B, H, T, D]`.
        enter: called before a layer's attention with its module, input, (cos, sin) and cache; it
            returns the (cos, sin) to rotate by.
    """
    seen: dict[str, Any] = {}

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        found = named_arguments(module, args, kwargs)
        hidden, rotation, cache = (_named(found, names) for names in _NAMES)
        if rotation is None:
            raise ValueError(f"{type(module).__name__} has no rotary embedding, which locret needs")
        if enter is not None:
            rotation = enter(module, hidden, rotation, cache)
        seen.clear()
        seen.update(hidden=hidden, rotation=rotation, cache=cache)
        found[next(n for n in _NAMES[1] if n in found)] = rotation
        return (), found

    with exchanged_attention(model, IMPLEMENTATION, _forward) as (modules, configs):
        before = [(id(config), _open.get(id(config))) for config in configs]
        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
        try:
            _open.update((id(config), (attend, seen, config)) for config in configs)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for key, session in before:
                if session is None:
                    _open.pop(key, None)
                else:
                    _open[key] = session


def _named(found: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((found[name] for name in names if name in found), None)


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function."""
    if id(module.config) not in _open:
        raise ValueError('attn_implementation "locret" works inside `with locret(...)` only')
    check_options(kwargs, IMPLEMENTATION)
    if dropout:
        raise ValueError("locret attention has no dropout: call model.eval()")
    attend, seen, _ = _open[id(module.config)]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(Call(module, module.layer_idx, query, key, value, scaling=scaling, **seen))
    return out.transpose(1, 2).contiguous(), None

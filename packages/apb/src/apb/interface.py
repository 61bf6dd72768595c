"""The seam to transformers: every attention call of a decoder goes to the host that is running.

No model code is patched: attention is exchanged through transformers' attention interface and all
is undone on exit. One model serves all virtual hosts: each is a thread, and finds its own handler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb._attention import check_options, exchanged_attention, named_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "apb"
# What attention modules call their input and (cos, sin): transformers, MiniCPM4.
_INPUTS, _ROTATIONS = ("hidden_states", "x"), ("position_embeddings", "cos_sin")


@dataclass
class LayerContext:
    """What a compressor may read besides q, k and v.

    module: the attention module. hidden [B, M, hidden size]: its input, after the norm.
    rotation: (cos, sin), each [B or 1, M, D].
    """

    module: torch.nn.Module
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]


# (module, q, k, v, scaling, context or None) -> out [B, Hq, M, D].
Handler = Callable[..., Tensor]
_local = threading.local()


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Refuse rotary embeddings that depend on the longest position a host happens to see."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    original = original or config.max_position_embeddings
    # Published MiniCPM4 has one list of factors for short and for long texts.
    one_list = kind == "longrope" and rope.get("short_factor") == rope.get("long_factor")
    if kind in ("dynamic", "longrope") and not one_list and tokens > original:
        raise ValueError(
            f"{kind} rotary embeddings change beyond {original} positions, so hosts would rotate "
            f"by different angles for {tokens} tokens; use a model with fixed ones, or "
            f"at most {original} tokens"
        )


@contextmanager
def exchanged(model: PreTrainedModel, *, inputs: bool = False) -> Iterator[None]:
    """Inside the block, attention is done by the handler of the running thread.

    inputs: also learn each layer's input and rotation, for compressors that read them.
    """
    if model.training:
        raise ValueError("apb prefills for inference: call model.eval() first")
    with exchanged_attention(model, IMPLEMENTATION, _forward) as (modules, _):
        handles = [m.register_forward_pre_hook(_learn, with_kwargs=True) for m in modules if inputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside the block, this thread's attention calls go to `handler`."""
    before = getattr(_local, "handler", None)
    _local.handler = handler
    try:
        yield
    finally:
        _local.handler = before
        _local.context = None


def _learn(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    found = named_arguments(module, args, kwargs)
    hidden = next(found[name] for name in _INPUTS if name in found)
    rotation = next((found[name] for name in _ROTATIONS if name in found), None)
    if rotation is None:
        raise ValueError(f"{type(module).__name__} has no rotary embedding, which apb needs")
    _local.context = LayerContext(module, hidden, rotation)


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
    handler = getattr(_local, "handler", None)
    if handler is None:
        raise ValueError('attn_implementation "apb" works inside apb.prefill and its context only')
    check_options(kwargs, IMPLEMENTATION)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = handler(module, query, key, value, scaling, getattr(_local, "context", None))
    return out.transpose(1, 2).contiguous(), None

"""The seam to transformers: every attention call of a decoder goes to the host that is running.

No model code is patched: attention is exchanged through transformers' attention interface and all
is undone on exit. One model serves all virtual hosts: each is a thread, and finds its own handler.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "apb"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seqlens_q")
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


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's attention modules, by layer; ValueError where their attention is another."""
    transformers = _transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model)}")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its "
            "attention cannot be exchanged"
        )
    found = [
        m
        for m in model.modules()
        if type(m).__name__.endswith("Attention") and isinstance(getattr(m, "layer_idx", None), int)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no numbered attention layers")
    for module in found:
        if getattr(module, "sliding_window", None):
            raise ValueError(
                f"layer {module.layer_idx} of {type(model).__name__} has a sliding window of "
                f"{module.sliding_window}: apb needs full attention (config.sliding_window=None)"
            )
    return sorted(found, key=lambda m: m.layer_idx)


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
    transformers = _transformers()
    transformers.AttentionInterface.register(IMPLEMENTATION, _forward)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    modules = attention_modules(model)
    if model.training:
        raise ValueError("apb prefills for inference: call model.eval() first")
    configs = {id(m.config): m.config for m in modules}
    configs[id(model.config)] = model.config
    before = [(c, c._attn_implementation) for c in configs.values()]
    handles = [m.register_forward_pre_hook(_learn, with_kwargs=True) for m in modules if inputs]
    try:
        for config, _ in before:
            config._attn_implementation_internal = IMPLEMENTATION
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, old in before:
            config._attn_implementation_internal = old


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
    found = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    found = {**found, **found.pop("kwargs", {})}
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
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"apb attention does not know {name}, which this model sets")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = handler(module, query, key, value, scaling, getattr(_local, "context", None))
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> None:
    """Who may see whom is the strategy's business."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is not None and mask_function is not causal_mask_function:
        raise ValueError(
            "apb attention is plain causal: sliding windows and custom masks are not supported"
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("apb needs transformers here: pip install 'minicpm4-apb[hf]'") from error
    return transformers

# Copied from common/_attention.py by common/sync.py: change it there.
"""Exchange the attention of a transformers decoder for a tool's own, and back.

No model code is patched: transformers' attention interface is told the tool's function under the
tool's name, and the model's configurations name it for as long as the block runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seqlens_q")


def attention_modules(model: PreTrainedModel, tool: str) -> list[torch.nn.Module]:
    """The decoder's self-attention modules, by layer.

    Raises:
        ImportError: transformers is not installed.
        ValueError: not a transformers decoder, or one whose attention cannot be exchanged.
    """
    transformers = _transformers(tool)
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
                f"{module.sliding_window}: {tool} needs full attention "
                "(config.sliding_window=None)"
            )
    return sorted(found, key=lambda m: m.layer_idx)


@contextmanager
def exchanged_attention(
    model: PreTrainedModel, tool: str, forward: Callable[..., Any]
) -> Iterator[tuple[list[torch.nn.Module], list[Any]]]:
    """Inside the block `forward` does the model's attention, and is given no mask.

    Args:
        model: a transformers decoder.
        tool: the implementation's name, that of the package.
        forward: transformers' attention function; the same in every call with this `tool`.

    Yields:
        The attention modules by layer, and the configurations that name the implementation.

    Raises:
        ImportError, ValueError: as `attention_modules`.
    """
    transformers = _transformers(tool)
    modules = attention_modules(model, tool)
    transformers.AttentionInterface.register(tool, forward)
    transformers.AttentionMaskInterface.register(tool, _plain_causal(tool))
    configs = {id(c): c for c in (*(m.config for m in modules), model.config)}
    before = [(c, c._attn_implementation) for c in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = tool
        yield modules, [config for config, _ in before]
    finally:
        for config, old in before:
            config._attn_implementation_internal = old


def check_options(options: dict[str, Any], tool: str) -> None:
    """ValueError where a model passes its attention an option that would change the result."""
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(f"{tool} attention does not know {name}, which this model sets")


def named_arguments(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a module's call by the names its `forward` gives them."""
    found = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**found, **found.pop("kwargs", {})}


def _plain_causal(tool: str) -> Callable[..., None]:
    def no_mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> None:
        """Who may see whom is the tool's business."""
        from transformers.masking_utils import causal_mask_function

        if mask_function is not None and mask_function is not causal_mask_function:
            raise ValueError(
                f"{tool} attention is plain causal: sliding windows and custom masks are not "
                "supported"
            )

    return no_mask


def _transformers(tool: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{tool} needs transformers here: pip install 'minicpm4-{tool}[hf]'"
        ) from error
    return transformers

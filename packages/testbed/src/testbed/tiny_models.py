"""Random models of well under a million parameters, one for each shape that breaks tools."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Common to all: tiny, but with more than one layer, and a head size that kernels accept.
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # With the usual 0.02 attention is near uniform at this width, and a wrong mask hardly shows.
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # None: generation runs to the length asked for instead of stopping at a random token.
    "eos_token_id": None,
}

# name -> (transformers configuration class, what differs from _COMMON)
_BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    # SmolLM2's group of three: not a power of two, so index arithmetic by shifts fails here.
    "llama-gqa3": (
        "LlamaConfig",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    ),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {}),
    # Its head size is a setting of its own: heads · head_dim differs from hidden_size.
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    # Query, key and value in one matrix, gate and up in one matrix.
    "phi3": ("Phi3Config", {}),
}

_GROUP = "testbed.tiny"


def tiny_archs() -> list[str]:
    """Names that `tiny` takes: the built-in ones and those of entry-point group `testbed.tiny`."""
    return sorted({*_BUILT_IN, *_plugins()})


def tiny(arch: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal language model in float32, on the CPU, in eval mode.

    The same arguments give the same weights. The caller's random state is left as it was. Biases
    and norm weights are random too: with the usual zeros and ones, a tool that drops them passes.

    Args:
        arch: a name of `tiny_archs()`.
        seed: of the weights.
        overrides: fields of the architecture's configuration, such as `num_hidden_layers=4`.

    Raises:
        ValueError: an unknown architecture or configuration field.
    """
    if arch not in _BUILT_IN:
        plugin = _plugins().get(arch)
        if plugin is None:
            raise ValueError(f"arch must be one of {', '.join(tiny_archs())}; got {arch!r}")
        build: Callable[..., PreTrainedModel] = plugin.load()
        return build(seed=seed, **overrides)

    import torch
    import transformers

    class_name, differs = _BUILT_IN[arch]
    config_class = getattr(transformers, class_name)
    # transformers keeps an unknown field without a word: a misspelt one would have no effect.
    known = set(config_class().to_dict()) | {"attn_implementation"}
    for name in overrides:
        if name not in known:
            raise ValueError(f"{arch}: {class_name} has no field {name!r}")
    config = config_class(**{**_COMMON, **differs, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias") or parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}

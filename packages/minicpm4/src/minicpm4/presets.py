"""Named sizes of MiniCPM4, and the way to its Auto classes and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm4.configuration import MiniCPM4Config
    from minicpm4.modeling import MiniCPM4ForCausalLM

# InfLLM v2 as MiniCPM4 was trained with it and publishes it.
TRAINED_SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}

# The small ones keep the published 0.5B's proportions (head_dim 64, feed-forward 4 × width, wide
# groups, tied head) at a vocabulary of a few thousand. Their µP base is the smallest width, 128: a
# base of 256 would give a width ratio below one, a ladder extrapolated downwards.
PRESETS: dict[str, dict[str, Any]] = {
    "8b": {"sparse_config": TRAINED_SPARSE_CONFIG},
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "sparse_config": TRAINED_SPARSE_CONFIG,
    },
    "mini": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "dim_model_base": 128,
        "eos_token_id": 0,
        "bos_token_id": 0,
    },
    "micro": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "dim_model_base": 128,
        "eos_token_id": 0,
        "bos_token_id": 0,
    },
    "nano": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "dim_model_base": 128,
        "eos_token_id": 0,
        "bos_token_id": 0,
    },
}


def preset(name: str, **overrides: Any) -> MiniCPM4Config:
    """Configuration of a named size: `8b` and `0.5b` as published; `mini`, `micro`, `nano` ours.

    Raises:
        ValueError: unknown name, or an override that the configuration refuses.
    """
    from minicpm4.configuration import MiniCPM4Config

    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return MiniCPM4Config(**{**PRESETS[name], **overrides})


def register() -> None:
    """Make the Auto classes of transformers know MiniCPM4; call it once, more often is harmless.

    Both names are registered: ours (`minicpm4`) and the published configuration's (`minicpm`),
    so that a published folder loads with this code and without `trust_remote_code`.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from minicpm4 import modeling

    for model, causal in (
        (modeling.MiniCPM4Model, modeling.MiniCPM4ForCausalLM),
        (modeling.MiniCPMModel, modeling.MiniCPMForCausalLM),
    ):
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, causal, exist_ok=True)


def load(path: str | Path, dtype: Any = "auto", **options: Any) -> MiniCPM4ForCausalLM:
    """Load a model folder: `config.json` and safetensors, in the published layout or ours.

    Args:
        path: the folder.
        dtype: a torch dtype, or "auto" for the checkpoint's own.
        options: passed to `from_pretrained`.

    Raises:
        FileNotFoundError: no folder, no `config.json`, or no weights in it.
        ValueError: the configuration is another model's.
    """
    import json

    from transformers import AutoModelForCausalLM

    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected a model folder")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: expected a transformers folder")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no weights: expected model.safetensors, or shards with "
            "model.safetensors.index.json"
        )
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in ("minicpm", "minicpm4"):
        raise ValueError(
            f"{folder}/config.json: model_type is {kind!r}, expected 'minicpm' or 'minicpm4'; "
            "load it with transformers' AutoModelForCausalLM"
        )
    register()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, **options
    )


def tiny(seed: int = 0, **overrides: Any) -> MiniCPM4ForCausalLM:
    """A random model of under a million parameters, fp32, in eval mode, for tests.

    It has an odd group size (3 query heads for each key-value head) and scalings that are not
    neutral. The global random state is left as it was.
    """
    import torch

    from minicpm4.modeling import MiniCPM4ForCausalLM

    sizes = {
        "vocab_size": 256,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "dim_model_base": 48,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MiniCPM4ForCausalLM(preset("nano", **{**sizes, **overrides})).eval()

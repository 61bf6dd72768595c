"""Named sizes of MiniCPM4, and the way to its Auto classes and checkpoints."""

from __future__ import annotations

import copy
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

# The published LongRoPE factors, one for each of the head_dim / 2 frequencies; short and long lists
# are the same. Each list is symmetric: factor i and factor n - 1 - i add up to one constant.
# fmt: off
FACTORS_8B = [
    0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193,
    1.0888815016813513, 1.1243301355211495, 1.166977103606075, 1.2182568066927284,
    1.2798772354275727, 1.3538666751582975, 1.4426259039919596, 1.5489853358570191,
    1.6762658237220625, 1.8283407612492941, 2.0096956085876183, 2.225478927469756,
    2.481536379650452, 2.784415934557119, 3.1413289096347365, 3.560047844772632,
    4.048719380066383, 4.615569542115128, 5.2684819496549835, 6.014438591970396,
    6.858830049237097, 7.804668263503327, 8.851768731513417, 9.99600492938444, 11.228766118181639,
    12.536757560834843, 13.902257701387796, 15.303885189125953, 16.717837610115794,
    18.119465097853947, 19.484965238406907, 20.792956681060105, 22.02571786985731,
    23.16995406772833, 24.217054535738416, 25.16289275000465, 26.007284207271347,
    26.753240849586767, 27.40615325712662, 27.973003419175363, 28.461674954469114,
    28.880393889607006, 29.237306864684626, 29.540186419591297, 29.79624387177199,
    30.01202719065413, 30.193382037992453, 30.34545697551969, 30.47273746338473,
    30.579096895249787, 30.66785612408345, 30.741845563814174, 30.80346599254902,
    30.85474569563567, 30.897392663720595, 30.932841297560394, 30.962293553185553,
    30.986754758742034, 31.007064503249293, 31.02392307921529,
]
FACTORS_05B = [
    1.0004360675811768, 1.0668443441390991, 1.1631425619125366, 1.3025742769241333,
    1.5040205717086792, 1.7941505908966064, 2.2101221084594727, 2.802666664123535,
    3.6389970779418945, 4.804192543029785, 6.39855432510376, 8.527148246765137,
    11.277542114257812, 14.684998512268066, 18.69317054748535, 23.13019371032715,
    27.72362518310547, 32.1606559753418, 36.168827056884766, 39.57627868652344, 42.32667541503906,
    44.45526885986328, 46.04962921142578, 47.21482849121094, 48.05115509033203, 48.64370346069336,
    49.05967712402344, 49.34980392456055, 49.551246643066406, 49.69068145751953,
    49.78697967529297, 49.85338592529297,
]
# fmt: on


def _longrope(factors: list[float]) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": 32768,
    }


# The small ones keep the published 0.5B's proportions (head_dim 64, feed-forward 4 × width, wide
# groups, tied head) at a vocabulary of a few thousand. Their µP base is the smallest width, 128: a
# base of 256 would give a width ratio below one, a ladder extrapolated downwards.
PRESETS: dict[str, dict[str, Any]] = {
    "8b": {
        "tie_word_embeddings": False,
        "rope_parameters": _longrope(FACTORS_8B),
        "sparse_config": TRAINED_SPARSE_CONFIG,
    },
    "0.5b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": _longrope(FACTORS_05B),
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
    # Deep, because a configuration is the caller's to change and the table is everyone's.
    return MiniCPM4Config(**{**copy.deepcopy(PRESETS[name]), **overrides})


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

"""The small files of a model folder: config.json, tokenizer, chat template."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from cpmcu import tokenizer
from cpmcu._fields import Fields
from cpmcu._files import write_json, write_text
from cpmcu.loader import Source
from cpmcu.rope import Rope
from cpmcu.spec import ModelSpec

# Beside weights and config.json; what a folder has of them is copied.
_COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


def write(source: Source, out: Path, *, quantization: dict[str, Any] | None) -> None:
    """Write all but the weights of `source` into `out`; config.json comes last.

    Args:
        source: folder or GGUF file.
        out: an existing folder.
        quantization: the "quantization_config" of the new config.json; None: none.
    """
    if source.gguf is None:
        for name in _COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, out / name)
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    else:
        _tokenizer_files(source, out)
        config = to_config(source.spec)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(out / "config.json", config)


def _tokenizer_files(source: Source, out: Path) -> None:
    """tokenizer.json and its settings from GGUF metadata."""
    words = tokenizer.load(source)
    if words is None:
        return
    backend = type(words.backend).from_str(words.backend.to_str())
    if words.prefix:
        from tokenizers.processors import TemplateProcessing

        (bos,) = words.prefix
        token = backend.id_to_token(bos)
        pieces = {"single": f"{token} $A", "pair": f"{token} $A {token}:1 $B:1"}
        backend.post_processor = TemplateProcessing(**pieces, special_tokens=[(token, bos)])
    write_text(out / "tokenizer.json", backend.to_str(pretty=True))
    fields = Fields(source.gguf.metadata, str(source.path))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "unk", "pad"):
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        token_id = fields.integer(f"tokenizer.ggml.{key}_token_id", None, low=0)
        if token_id is not None and (token := backend.id_to_token(token_id)) is not None:
            settings[f"{name}_token"] = token
    if template := fields.text("tokenizer.chat_template", ""):
        settings["chat_template"] = template
    write_json(out / "tokenizer_config.json", settings)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """A transformers `config.json` that `spec.from_config` reads back to an equal spec."""
    # GGUF calls every Llama-like model "llama"; its "minicpm" is transformers' "minicpm4".
    kind = {"minicpm": "minicpm4"}.get(spec.architecture, spec.architecture)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [f"{name.get(kind, 'MiniCPM4')}ForCausalLM"],
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.rms_eps,
        "max_position_embeddings": spec.max_context,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tie,
        "bos_token_id": spec.bos,
        "eos_token_id": list(spec.eos) or None,
        "rope_theta": spec.rope.theta,
        "rope_parameters": _rope(spec.rope),
    }
    if kind == "minicpm4":
        config |= {
            "scale_emb": spec.embed_scale,
            "scale_depth": spec.residual_scale * math.sqrt(spec.layers),
            "dim_model_base": spec.logit_scale * spec.hidden,
        }
    if kind == "mistral":
        config["sliding_window"] = spec.window
    return config


def _rope(rope: Rope) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind in ("linear", "llama3"):
        values["factor"] = rope.factor
    if rope.kind == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.kind in ("llama3", "longrope"):
        values["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "longrope":
        values |= {
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
            "attention_factor": rope.attention_factor,
        }
    return values

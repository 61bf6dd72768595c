"""A packed model folder as a GGUF file with ternary tensors.

The file holds the hyper-parameters and all tensors, no tokenizer ("tokenizer.ggml.model" = "none"):
engines that take tokens load it. Llama and Qwen3 decoders; others need llama.cpp's own converter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ._files import atomic_path
from .convert import plain_config
from .format import PackedFile
from .ggml_types import BLOCKS, to_ggml

# transformers' model type: ggml's architecture, and whether rows of q and k change places (ggml
# rotates neighbours in llama, transformers halves).
ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen3": ("qwen3", False)}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        architecture: ggml's.
        ternary: tensors in the ternary type.
        plain: the other tensors (matrices fp16, vectors float32).
        error: largest relative error of a ternary tensor; 0.0 if all are exact.
        bytes: of the file.
    """

    architecture: str
    ternary: int
    plain: int
    error: float
    bytes: int


def export_gguf(
    packed_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str = "TQ2_0",
    allow_error: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a packed folder as a GGUF file, atomically.

    Args:
        packed_dir: folder made by `pack_model`.
        out: file to write.
        kind: of the ternary tensors, a key of `ggml_types.BLOCKS`.
        allow_error: see `ggml_types.to_ggml`.
        progress: called with (tensors done, tensors in all).

    Raises:
        FileNotFoundError: there is no such folder, or no packed file in it.
        ImportError: gguf is not installed.
        ValueError: the architecture is not known, or `kind` cannot hold a tensor.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("export needs gguf: pip install 'minicpm4-bitcpm[gguf]'") from None
    if kind not in BLOCKS:
        raise ValueError(f"kind must be one of {', '.join(BLOCKS)}; got {kind!r}")
    source = Path(packed_dir)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: expected a packed model")
    config = plain_config(source)
    if (model_type := config.get("model_type")) not in ARCHITECTURES:
        raise ValueError(
            f"{source} is a {model_type!r} model; export knows {', '.join(ARCHITECTURES)}"
        )
    architecture, interleaved = ARCHITECTURES[model_type]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    ternary, errors = 0, [0.0]
    with PackedFile(source) as file, atomic_path(out) as target:
        names = file.names()
        writer = gguf.GGUFWriter(target, architecture)
        _write_config(writer, config, heads, kv_heads)
        for done, name in enumerate(names, 1):
            new, count = gguf_name(name), {"q_proj": heads, "k_proj": kv_heads}
            of = next((n for key, n in count.items() if key in name and interleaved), None)
            if name in file.entries:
                block = to_ggml(file.packed(name), kind, allow_error)
                data = block.data if of is None else _interleave(block.data, of)
                writer.add_tensor(new, data, raw_dtype=gguf.GGMLQuantizationType[kind])
                ternary, errors = ternary + 1, [*errors, block.error]
            else:
                writer.add_tensor(new, _plain(file.tensor(name), of))
            if progress:
                progress(done, len(names))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        size = target.stat().st_size
    return ExportReport(architecture, ternary, len(names) - ternary, max(errors), size)


def gguf_name(name: str) -> str:
    """ggml's name of a transformers tensor.

    Raises:
        ValueError: there is none.
    """
    if name in _TOP:
        return _TOP[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not found or found[2] not in _LAYER:
        raise ValueError(f"ggml has no name for the tensor {name}")
    return f"blk.{found[1]}.{_LAYER[found[2]]}.{found[3]}"


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs of both."""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)


def _plain(t: Tensor, heads: int | None) -> np.ndarray:
    # ggml wants vectors in float32. Embeddings and the head take half of it; range permitting.
    wide = t.float().numpy()
    wide = wide if heads is None else _interleave(wide, heads)
    halves = wide.astype(np.float16)
    return halves if t.dim() > 1 and np.isfinite(halves).all() else wide


def _write_config(writer: Any, config: dict[str, Any], heads: int, kv_heads: int) -> None:
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError(f"export knows plain rotary embeddings only, got {rope}")
    writer.add_name("bitcpm export")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

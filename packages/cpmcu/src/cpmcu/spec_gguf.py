"""The spec of a GGUF file, and the names its tensors have in transformers."""

from __future__ import annotations

import numpy as np

from cpmcu._fields import Fields
from cpmcu.gguf_file import GGUFFile
from cpmcu.rope import Rope
from cpmcu.spec import ModelSpec

ARCHITECTURES = ("llama", "qwen2", "qwen3", "minicpm")
# llama.cpp rotates neighbouring pairs in these, so its converter interleaves the rows of q and k.
_INTERLEAVED = ("llama", "minicpm")
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
# Metadata in the shape of tensors: part of the spec, not weights.
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def transformers_name(name: str) -> str | None:
    """The transformers name (less "model.") of a GGUF tensor; None for rope factors."""
    if name in _FACTORS:
        return None
    if name in _TOP:
        return _TOP[name]
    head, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    stem, _, suffix = part.rpartition(".")
    if head == "blk" and number.isdecimal():
        if part in _LAYER:
            return f"layers.{int(number)}.{_LAYER[part]}"
        if stem in _LAYER and suffix in ("weight", "bias"):
            return f"layers.{int(number)}.{_LAYER[stem]}.{suffix}"
    return name


def gguf_name(name: str) -> str:
    """The GGUF name of a transformers tensor (less "model."): undoes `transformers_name`."""
    outer = {theirs: ours for ours, theirs in _TOP.items()}
    if name in outer:
        return outer[name]
    _, number, part = name.split(".", 2)
    stem, _, suffix = part.rpartition(".")
    layer = {theirs: ours for ours, theirs in _LAYER.items()}
    found = layer[part] if part in layer else f"{layer[stem]}.{suffix}"
    return f"blk.{number}.{found}"


def interleaved_heads(spec: ModelSpec, name: str, architecture: str | None = None) -> int:
    """Number of heads whose rows llama.cpp interleaves in the transformers tensor `name`, or 0.

    `architecture` is its name for the model, where that is not the spec's.
    """
    if (architecture or spec.architecture) not in _INTERLEAVED:
        return 0
    return {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.rsplit(".", 2)[-2], 0)


def halves(rows: int, heads: int) -> np.ndarray:
    """Order of rows from llama.cpp's neighbouring pairs to a head's two halves."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def pairs(rows: int, heads: int) -> np.ndarray:
    """Order of rows from a head's two halves to llama.cpp's neighbouring pairs."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def from_gguf(file: GGUFFile) -> ModelSpec:
    """The spec from GGUF metadata. ValueError names the file and the field."""
    fields = Fields(file.metadata, str(file.path))
    arch = fields.text("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise fields.error("general.architecture", f"is '{arch}', supported are {known}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.error("has no two-dimensional tensor 'token_embd.weight'")
    hidden, heads = (
        fields.integer(f"{arch}.embedding_length"),
        fields.integer(f"{arch}.attention.head_count"),
    )
    head_dim = fields.integer(f"{arch}.attention.key_length", hidden // heads)
    if fields.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise fields.error(f"{arch}.attention.value_length", f"must equal key_length={head_dim}")
    if fields.integer(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise fields.error(
            f"{arch}.rope.dimension_count", f"must be {head_dim} (all dimensions rotate)"
        )
    if fields.integer(f"{arch}.expert_count", 0, low=0):
        raise fields.error(f"{arch}.expert_count", "must be 0: experts are not implemented")
    max_context = fields.integer(f"{arch}.context_length")
    scales = {}
    if arch == "minicpm":
        scales = {
            "embed_scale": fields.number("minicpm.embedding_scale"),
            "residual_scale": fields.number("minicpm.residual_scale"),
            # stored as a divisor, hidden / dim_model_base
            "logit_scale": 1.0 / fields.number("minicpm.logit_scale", above=1e-6),
        }
    end = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return ModelSpec(
        architecture=arch,
        hidden=hidden,
        layers=fields.integer(f"{arch}.block_count", high=10_000),
        heads=heads,
        kv_heads=fields.integer(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=fields.integer(f"{arch}.feed_forward_length"),
        vocab=embedding.shape[0],
        rms_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, fields, arch, head_dim, max_context),
        max_context=max_context,
        qk_norm=arch == "qwen3",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tie="output.weight" not in file.tensors,
        window=fields.integer(f"{arch}.attention.sliding_window", None),
        bos=fields.integer("tokenizer.ggml.bos_token_id", None, low=0),
        eos=tuple(dict.fromkeys(i for name in end for i in fields.ids(name))),
        source=str(file.path),
        **scales,
    )


def _rope(file: GGUFFile, fields: Fields, arch: str, head_dim: int, max_context: int) -> Rope:
    theta = fields.number(f"{arch}.rope.freq_base", 10_000.0)
    kind = fields.text(f"{arch}.rope.scaling.type", "none")
    sharpen = fields.number(f"{arch}.rope.scaling.attn_factor", 1.0)
    present = [name for name in _FACTORS if name in file.tensors]
    if present:
        # Divisors of the frequencies, per pair of dimensions: Llama 3.1's scaling comes as one
        # list, LongRoPE's as two.
        lists = [
            tuple(_factor_list(file, name, head_dim // 2))
            for name in (
                ("rope_freqs.weight",) * 2 if present == ["rope_freqs.weight"] else _FACTORS[:0:-1]
            )
        ]
        original = fields.integer(f"{arch}.rope.scaling.original_context_length", max_context)
        return Rope(
            theta=theta,
            kind="longrope",
            original_context=original,
            short_factor=lists[0],
            long_factor=lists[1],
            attention_factor=sharpen,
        )
    if kind == "linear":
        factor = fields.number(f"{arch}.rope.scaling.factor")
        return Rope(theta=theta, kind=kind, factor=factor)
    if kind != "none":
        known = "none, linear, longrope (with its factor tensors)"
        raise fields.error(f"{arch}.rope.scaling.type", f"is '{kind}', supported are {known}")
    return Rope(theta=theta)


def _factor_list(file: GGUFFile, name: str, length: int) -> list[float]:
    if name not in file.tensors or file.tensors[name].shape != (length,):
        raise file.error(f"needs a tensor '{name}' of shape ({length},)")
    values = np.concatenate([piece for _, piece in file.pieces(name)])
    if not bool((values > 0).all() & np.isfinite(values).all()):
        raise file.error(f"tensor '{name}' must hold positive finite factors")
    return values.tolist()

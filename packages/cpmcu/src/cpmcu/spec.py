"""What a model is: the hyper-parameters a decoder needs, read from a transformers `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from cpmcu import sparse
from cpmcu._fields import Fields, read_json
from cpmcu.rope import KINDS, Rope
from cpmcu.sparse import SparseAttention

# model_type -> (queries and keys are normalised, q/k/v have biases, embeddings tied by default)
ARCHITECTURES = {
    "llama": (False, False, False),
    "mistral": (False, False, False),
    "qwen2": (False, True, False),
    "qwen3": (True, False, False),
    "minicpm": (False, False, True),
    "minicpm4": (False, False, True),
}

# A list of tensors is made from the number of layers before the file can contradict it.
_MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only transformer of the Llama family, in numbers.

    `embed_scale`, `residual_scale` and `logit_scale` are the µP multipliers of MiniCPM
    (arXiv:2404.06395, section 3): of the embeddings, of every sub-layer's output before it joins
    the residual stream, and of the final hidden state before the head. `window` is the number
    of latest positions a token may attend to, its own included (None: all). `sparse` is None where
    attention is dense. `int8_cache`: keys and values are held in 8 bits, which is the engine's
    choice and in no file. `eos` may be empty.
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rms_eps: float
    rope: Rope
    max_context: int
    qk_norm: bool = False
    qkv_bias: bool = False
    tie: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    window: int | None = None
    sparse: SparseAttention | None = None
    int8_cache: bool = False
    bos: int | None = None
    eos: tuple[int, ...] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check what single fields cannot show; ValueError names the source and the field."""
        fields = Fields({}, self.source or "ModelSpec")
        if self.heads % self.kv_heads:
            raise fields.error("kv_heads", f"must divide heads={self.heads}, got {self.kv_heads}")
        if self.head_dim % 2:
            raise fields.error("head_dim", f"must be even for rotary angles, got {self.head_dim}")
        for name, ids in (("bos", () if self.bos is None else (self.bos,)), ("eos", self.eos)):
            if any(token >= self.vocab for token in ids):
                raise fields.error(name, f"must be below vocab={self.vocab}, got {ids}")

    @property
    def qkv_rows(self) -> int:
        """Output rows of the fused query-key-value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        attention = self.qkv_rows * (self.hidden + self.qkv_bias)
        attention += self.heads * self.head_dim * self.hidden + self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + (1 if self.tie else 2) * self.vocab * self.hidden + self.hidden

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name (as in transformers, less the "model." prefix) and shape of every weight."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (self.ffn, h),
            "mlp.up_proj.weight": (self.ffn, h),
            "mlp.down_proj.weight": (h, self.ffn),
        }
        if self.qkv_bias:
            layer |= {
                f"self_attn.{n}_proj.bias": (r,) for n, r in zip("qkv", (q, kv, kv), strict=True)
            }
        if self.qk_norm:
            layer |= {f"self_attn.{n}_norm.weight": (self.head_dim,) for n in "qk"}
        shapes = {"embed_tokens.weight": (self.vocab, h), "norm.weight": (h,)}
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes if self.tie else shapes | {"lm_head.weight": (self.vocab, h)}


def from_folder(folder: Path) -> ModelSpec:
    """The spec of a transformers model folder. ValueError names the file and the field.

    End-of-text ids of `generation_config.json` are added to those of `config.json`: chat models
    often list the end of a turn only there.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; a model folder holds it beside model.safetensors"
        )
    extra: tuple[int, ...] = ()
    if (folder / "generation_config.json").is_file():
        extra = read_json(folder / "generation_config.json").ids("eos_token_id")
    return from_config(read_json(path), extra_eos=extra)


def from_config(config: Fields, *, extra_eos: tuple[int, ...] = ()) -> ModelSpec:
    """The spec of a parsed `config.json`, in the style of transformers 4 or 5."""
    architecture = config.text("model_type")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise config.error("model_type", f"is '{architecture}', supported are {known}")
    qk_norm, qkv_bias, tie = ARCHITECTURES[architecture]
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.boolean(name, False):
            raise config.error(name, "is true, which this engine does not implement")
    if (act := config.text("hidden_act", "silu")) not in ("silu", "swish"):
        raise config.error("hidden_act", f"must be 'silu' (SwiGLU), got '{act}'")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if "head_dim" not in config and hidden % heads:
        raise config.error("hidden_size", f"must be a multiple of {heads} heads, got {hidden}")
    layers, head_dim = (
        config.integer("num_hidden_layers", high=_MOST_LAYERS),
        config.integer("head_dim", hidden // heads),
    )
    max_context = config.integer("max_position_embeddings")
    scales = {}
    if architecture.startswith("minicpm"):
        # Wrong by a factor of twelve is still fluent: a missing scale is an error, null means none.
        for name in ("scale_emb", "scale_depth", "dim_model_base"):
            if name not in config.values:
                raise config.error(name, "is missing (null turns this scaling off)")
        base = config.number("dim_model_base", None)
        scales = {
            "embed_scale": config.number("scale_emb", 1.0),
            "residual_scale": config.number("scale_depth", math.sqrt(layers)) / math.sqrt(layers),
            "logit_scale": base / hidden if base else 1.0,
        }
    return ModelSpec(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=config.integer("intermediate_size"),
        vocab=config.integer("vocab_size"),
        rms_eps=config.number("rms_norm_eps"),
        rope=_rope(config, head_dim, max_context),
        max_context=max_context,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        tie=config.boolean("tie_word_embeddings", tie),
        window=config.integer("sliding_window", None) if architecture == "mistral" else None,
        sparse=sparse.from_config(config),
        bos=next(iter(config.ids("bos_token_id")), None),
        eos=tuple(dict.fromkeys((*config.ids("eos_token_id"), *extra_eos))),
        source=config.source,
        **scales,
    )


def _rope(config: Fields, head_dim: int, max_context: int) -> Rope:
    # transformers 5 keeps theta and scaling in `rope_parameters`; before, theta stood at the top
    # level and `rope_scaling` (kind in "rope_type", earlier "type") beside it.
    scaling = config.child("rope_parameters") or config.child("rope_scaling")
    theta = config.number("rope_theta", 10_000.0)
    if scaling is None:
        return Rope(theta=theta)
    theta = scaling.number("rope_theta", theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)  # its first name
    if kind not in KINDS:
        raise scaling.error("rope_type", f"is '{kind}', supported are {', '.join(KINDS)}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "must be 1 (all dimensions rotate)")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=scaling.number("factor"))
    original = scaling.integer(
        "original_max_position_embeddings",
        config.integer("original_max_position_embeddings", max_context),
    )
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if high <= low:
            raise scaling.error("high_freq_factor", f"must be above low_freq_factor={low}")
        factor = scaling.number("factor")
        return Rope(
            theta=theta,
            kind=kind,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=original,
        )
    factor = scaling.number("factor", max_context / original)
    # LongRoPE, equation 5: longer contexts spread attention, so logits are sharpened.
    sharpen = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    return Rope(
        theta=theta,
        kind=kind,
        original_context=original,
        short_factor=scaling.numbers("short_factor", head_dim // 2),
        long_factor=scaling.numbers("long_factor", head_dim // 2),
        attention_factor=scaling.number("attention_factor", sharpen),
    )

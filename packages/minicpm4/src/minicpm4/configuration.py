"""MiniCPM4's configuration: its report (arXiv 2506.07900) §2.1; µP: MiniCPM (2404.06395) §3."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "longrope")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class MiniCPM4Config(PreTrainedConfig):
    r"""Configuration of a MiniCPM4 decoder; reads the published `config.json` unchanged.

    The defaults are MiniCPM4-8B's, but for the head: a `config.json` that does not say
    `tie_word_embeddings` means a tied one, as in the published class.
    The three µP scalings are part of the architecture:

        h_0     = scale_emb · Embedding(tokens)
        h_{l+1} = h_l + scale_depth / √num_hidden_layers · SubLayer(RMSNorm(h_l))
        logits  = LMHead(RMSNorm(h_L) / (hidden_size / dim_model_base))

    With `scale_emb=1, scale_depth=√num_hidden_layers, dim_model_base=hidden_size` they are neutral
    and the model is a Llama.

    Args:
        vocab_size: number of tokens.
        hidden_size: width d of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads; divides `num_attention_heads`.
        head_dim: width of a head, even; by default hidden_size / num_attention_heads.
        max_position_embeddings: longest context the model is meant for, in tokens.
        rope_parameters: RoPE in transformers' form. `{"rope_type": "longrope", "short_factor": …,
            "long_factor": …, "original_max_position_embeddings": …}` divides each of the
            head_dim/2 frequencies by its factor (see `minicpm4.longrope`). The published files
            call it `rope_scaling`, which is read as well.
        tie_word_embeddings: whether `lm_head` is the embedding matrix.
        scale_emb: factor on the token embeddings.
        scale_depth: numerator of the factor on each sub-layer's output.
        dim_model_base: width at which the µP ladder was tuned.
        mup_denominator: published with some checkpoints; kept, not used by the model.
        sparse_config: InfLLM v2's settings (`kernel_size`, `topk`, …) as published; kept for
            `infllm2.InfLLMv2Config.from_pretrained_config`, the model itself runs dense.
        initializer_range: standard deviation of initial weights at width `dim_model_base`.

    Raises:
        ValueError: sizes that do not divide, sizes or scalings that are not positive, a RoPE type
            or factor list that does not fit, or a mixture of experts (`num_experts`).
    """

    model_type = "minicpm4"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 73448
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.1
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    scale_emb: int | float = 12
    scale_depth: int | float = 1.4
    dim_model_base: int = 256
    mup_denominator: int | None = None
    sparse_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what depends on other fields, and refuse what cannot work."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if kwargs.get("num_experts"):
            raise ValueError(
                f"num_experts is {kwargs['num_experts']}: mixtures of experts are another model, "
                "expected a dense MiniCPM"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: a group must be whole"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        for name in ("scale_emb", "scale_depth", "dim_model_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        # transformers writes its defaults into the dictionary it is given: spare the caller's.
        self.rope_parameters = _rope_copy(self.rope_parameters)
        if "rope_scaling" in kwargs:
            kwargs["rope_scaling"] = _rope_copy(kwargs["rope_scaling"])
        super().__post_init__(**kwargs)
        self._check_rope()

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if rope["rope_type"] not in ROPE_TYPES:
            raise ValueError(
                f"rope_scaling: rope_type {rope['rope_type']!r} is not MiniCPM4's, expected "
                f"{' or '.join(ROPE_TYPES)}"
            )
        if rope["rope_type"] == "default":
            return
        wanted = self.head_dim // 2
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if not isinstance(factors, list | tuple) or len(factors) != wanted:
                got = len(factors) if isinstance(factors, list | tuple) else factors
                raise ValueError(
                    f"rope_scaling.{name} must list head_dim / 2 = {wanted} numbers, got {got}"
                )
            if not all(isinstance(f, int | float) and f > 0 for f in factors):
                raise ValueError(f"rope_scaling.{name} must hold positive numbers only")

    def validate_rope(self) -> None:
        """Nothing more to do: `_check_rope` raises where transformers would only warn."""

    @property
    def residual_scale(self) -> float:
        """Factor on each sub-layer's output before it joins the residual stream."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def width_ratio(self) -> float:
        """hidden_size / dim_model_base: how much wider than the µP ladder's base."""
        return self.hidden_size / self.dim_model_base


class PublishedMiniCPMConfig(MiniCPM4Config):
    """The same configuration under the name that the published `config.json` carries."""

    model_type = "minicpm"


def _rope_copy(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy with the type under `rope_type`, as transformers 5 has it, and not under `type`."""
    if rope is None:
        return None
    rope = dict(rope)
    old = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old or "default"
    return rope

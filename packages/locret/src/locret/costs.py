"""What a configuration costs, in closed form: bytes held, attention's operations, the heads' own.

Tests hold each to what the code does at small scale; `locret explain` prints them at any scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from locret.config import LocretConfig
from locret.quantised import entry_bytes


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that costs depend on.

    Attributes:
        layers, heads, kv_heads, head_dim, hidden_size: as `heads.shape_of`.
        intermediate_size: of a gated MLP; 0 leaves it out.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int = 0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration."""
        from locret.heads import shape_of_config

        text = config.get_text_config(decoder=True)
        return cls(
            **shape_of_config(config), intermediate_size=getattr(text, "intermediate_size", 0) or 0
        )


@dataclass(frozen=True)
class Costs:
    """One sequence, all layers.

    Attributes:
        full_bytes: keys and values of all tokens, in the model's dtype.
        held_bytes: the most keys and values that are held at any time, with the scales of coded
            ones; the same for all `budgets`.
        note_bytes: what is noted of them: scores, positions, masses where entries are merged, how
            far coded keys are to be turned, and where packed ones lie. An upper bound where
            budgets are not uniform: then notes are as wide as the fullest head's.
        head_parameters: of all retaining heads.
        pairs, full_pairs: (query, key) pairs that one query head's prefill visits in one layer.
        attention_flops, full_attention_flops: of prefill.
        head_flops: the retaining heads', of prefill.
        linear_flops: the model's own projections and MLPs, of prefill.
        chunks: calls of the model.
    """

    full_bytes: int
    held_bytes: int
    note_bytes: int
    head_parameters: int
    pairs: int
    full_pairs: int
    attention_flops: int
    full_attention_flops: int
    head_flops: int
    linear_flops: int
    chunks: int

    @property
    def prefill_speedup(self) -> float:
        """Operations of dense prefill over ours: what it allows, were all kernels equally good."""
        dense = self.full_attention_flops + self.linear_flops
        return dense / (self.attention_flops + self.linear_flops + self.head_flops)


def costs(
    shape: Shape, tokens: int, config: LocretConfig, *, hidden: int = 256, input: str = "hidden",
    bytes_per_value: int = 2,
) -> Costs:  # fmt: skip
    """Costs of a prompt.

    Args:
        shape: the model's.
        tokens: length of the prompt, at least 1.
        config: sizes.
        hidden: d_R of the heads, 0 for linear ones; both with biases.
        input: "hidden" or "qkv", what the heads read.
        bytes_per_value: of a number in the model's dtype.
    """
    if tokens < 1 or bytes_per_value < 1 or hidden < 0:
        raise ValueError(
            f"tokens and bytes must be at least 1 and hidden 0, got {tokens}, {bytes_per_value}, "
            f"{hidden}"
        )
    held = pairs = chunks = peak = 0
    body = max(tokens - config.tail, 0)
    for piece in _pieces(body, config.chunk, tokens):
        pairs += piece * held + piece * (piece + 1) // 2
        peak = max(peak, held + piece)
        # The prompt's tail is read after the last eviction.
        held = held + piece if chunks * config.chunk >= body else min(held + piece, config.budget)
        chunks += 1
    entry = shape.layers * shape.kv_heads
    full, coded = (
        2 * entry_bytes(storage, shape.head_dim, bytes_per_value)
        for storage in ("model", config.storage)
    )
    note, columns = 8, peak
    note += 4 * (config.merge is not None)
    note += 4 * (config.storage != "model" and config.positions == "contiguous" and tokens > peak)
    if config.budgets != "uniform":
        note, columns = note + 8, min(tokens, config.ceiling + config.chunk)
    full_pairs = tokens * (tokens + 1) // 2
    per_pair = 4 * shape.layers * shape.heads * shape.head_dim
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    inputs = shape.hidden_size if input == "hidden" else width
    matrices = hidden * (inputs + shape.kv_heads) if hidden else inputs * shape.kv_heads
    linear = shape.hidden_size * (width + shape.heads * shape.head_dim)
    linear += 3 * shape.hidden_size * shape.intermediate_size
    return Costs(
        full_bytes=entry * full * tokens,
        held_bytes=entry * coded * peak,
        note_bytes=entry * note * columns,
        head_parameters=shape.layers * (matrices + hidden + shape.kv_heads),
        pairs=pairs,
        full_pairs=full_pairs,
        attention_flops=per_pair * pairs,
        full_attention_flops=per_pair * full_pairs,
        head_flops=2 * shape.layers * matrices * tokens,
        linear_flops=2 * shape.layers * linear * tokens,
        chunks=chunks,
    )


def _pieces(body: int, chunk: int, tokens: int) -> list[int]:
    whole, rest = divmod(body, chunk)
    return [chunk] * whole + [rest] * (rest > 0) + [tokens - body] * (tokens > body)

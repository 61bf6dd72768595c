"""What InfLLM v2 costs and may gain, in closed form: floating-point operations, bytes, speed-up
bounds.

The bounds are arithmetic: they suppose that sparse and dense kernels reach the same share of the
machine's peak. Counts are for one attention layer and one sequence; a multiply-add is two
operations; the softmax and the pooling are left out on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from infllm2.config import COARSE_FACTOR, InfLLMv2Config


@dataclass(frozen=True)
class Costs:
    """Costs of one attention layer at a length; see `costs`.

    Attributes:
        tokens: length of the sequence (S).
        dense_pairs: (query, key) pairs of causal attention over the whole prompt.
        sparse_pairs: pairs that InfLLM v2 attends to.
        score_pairs: (query, kernel) products of the selection, coarse and fine.
        dense_flops: operations of dense prefill, all heads.
        sparse_flops: operations of sparse prefill: attention over visited blocks.
        score_flops: operations of the selection in prefill.
        dense_decode_bytes: bytes of keys and values read for one more token, dense.
        sparse_decode_bytes: the same over visited blocks.
        score_decode_bytes: bytes of compressed keys read for one more token.
        cache_bytes: keys and values of the sequence.
        compressed_bytes: compressed keys, fine and coarse.
        score_matrix_bytes: scores of all queries against all fine kernels (float32, one per
            key-value head), which a tiled selection never holds.
        block_list_bytes: the chosen blocks of all queries (int32).
    """

    tokens: int
    dense_pairs: int
    sparse_pairs: int
    score_pairs: int
    dense_flops: int
    sparse_flops: int
    score_flops: int
    dense_decode_bytes: int
    sparse_decode_bytes: int
    score_decode_bytes: int
    cache_bytes: int
    compressed_bytes: int
    score_matrix_bytes: int
    block_list_bytes: int

    @property
    def prefill_speedup(self) -> float:
        """Bound on the gain in prefill: ratio of operations."""
        return self.dense_flops / (self.sparse_flops + self.score_flops)

    @property
    def decode_speedup(self) -> float:
        """Bound on the gain per decoded token: ratio of bytes."""
        return self.dense_decode_bytes / (self.sparse_decode_bytes + self.score_decode_bytes)

    @property
    def prefill_extra_bytes(self) -> int:
        """Memory that prefilling the whole prompt in one call takes beyond inputs and output."""
        return self.compressed_bytes + self.block_list_bytes

    @property
    def visited_share(self) -> float:
        """Share of causal (query, key) pairs that are attended to in prefill, 0 … 1."""
        return self.sparse_pairs / self.dense_pairs


def costs(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    config: InfLLMv2Config,
    *,
    bytes_per_value: int = 2,
) -> Costs:
    """Costs of one attention layer with a prompt of `tokens`, then of the next token.

    The dense switch is ignored, so that the crossing point can be read off.

    Args:
        tokens: length of the prompt; at least 1.
        heads: query heads; a multiple of `kv_heads`.
        kv_heads: key-value heads.
        head_dim: size of one head.
        config: sizes and budget.
        bytes_per_value: bytes of one cached number (2 for bfloat16).

    Raises:
        ValueError: a number is not positive, or heads is not a multiple of kv_heads.
    """
    given = {
        "tokens": tokens,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "bytes_per_value": bytes_per_value,
    }
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")

    fine = (config.kernel_size, config.kernel_stride)
    coarse = (COARSE_FACTOR * config.kernel_size, COARSE_FACTOR * config.kernel_stride)
    # With exact normalisation the first pass reads the fine kernels too (section 3.3 of the paper).
    passes = (coarse if config.lse == "approx" else fine, fine)
    dense_pairs = tokens * (tokens + 1) // 2
    sparse_pairs = _visited_keys_until(tokens, config)
    score_pairs = sum(_kernels_until(tokens, *kernel) for kernel in passes)

    token_bytes = kv_heads * head_dim * bytes_per_value
    visible = _visited_keys(tokens - 1, config)
    return Costs(
        tokens=tokens,
        dense_pairs=dense_pairs,
        sparse_pairs=sparse_pairs,
        score_pairs=score_pairs,
        dense_flops=4 * heads * head_dim * dense_pairs,
        sparse_flops=4 * heads * head_dim * sparse_pairs,
        score_flops=2 * heads * head_dim * score_pairs,
        dense_decode_bytes=2 * token_bytes * tokens,
        sparse_decode_bytes=2 * token_bytes * visible,
        score_decode_bytes=token_bytes * sum(_kernels(tokens, *kernel) for kernel in passes),
        cache_bytes=2 * token_bytes * tokens,
        compressed_bytes=token_bytes * sum(_kernels(tokens, *k) for k in {fine, passes[0]}),
        score_matrix_bytes=4 * kv_heads * tokens * _kernels(tokens, *fine),
        block_list_bytes=4 * kv_heads * tokens * config.budget,
    )


def _kernels(length: int, size: int, stride: int) -> int:
    """Complete kernels of a sequence."""
    return max(0, (length - size) // stride + 1)


def _kernels_until(length: int, size: int, stride: int) -> int:
    """Σ kernels(t + 1) over t < length: what all queries see."""
    steps = length - size + 1
    if steps <= 0:
        return 0
    # Queries size − 1, size, … see 1 kernel for `stride` steps, then 2, and so on.
    full, rest = divmod(steps, stride)
    return stride * full * (full + 1) // 2 + rest * (full + 1)


def _visited_keys(position: int, config: InfLLMv2Config) -> int:
    """Keys the query at a position attends to: whole blocks, and its own up to itself."""
    own, inside = divmod(position, config.block_size)
    return (min(own + 1, config.budget) - 1) * config.block_size + inside + 1


def _visited_keys_until(length: int, config: InfLLMv2Config) -> int:
    """Σ visited_keys(t) over t < length."""
    block, budget = config.block_size, config.budget
    full, rest = divmod(length, block)
    # Whole blocks before the own one: 0, 1, … budget − 1, and budget − 1 from there on.
    rising = min(full, budget)
    before = rising * (rising - 1) // 2 + (full - rising) * (budget - 1)
    own = full * (block * (block + 1) // 2) + rest * (rest + 1) // 2
    return before * block * block + rest * (min(full + 1, budget) - 1) * block + own
